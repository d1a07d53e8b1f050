"""Labels as users give them to the API: the right answer, or one line with name, value and remedy."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import contrastive
from contrastive.errors import UserError
from contrastive.evaluation import LinearProbe, ZeroShotClassifier, evaluate_labelled, few_shot, knn_sweep
from contrastive.evaluation.calibration import expected_error, temperature
from contrastive.evaluation.class_names import class_name_map
from contrastive.evaluation.label_arrays import label_array, label_places
from contrastive.evaluation.labels import check_labels, in_order, number_remark, spelling_remarks
from contrastive.evaluation.rejection import label_thresholds
from tests.evaluation.fake import NAMES, ColourModel, square

ROWS = np.random.default_rng(0).normal(size=(12, 4))
TEXTS = ["cat", "dog", "cow"] * 4
NUMBERS = [0, 1, 2] * 4


class NA:
    """Stands for pandas' NA: it has no truth value."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


NA.__name__ = "NAType"
MISSING = [None, float("nan"), np.nan, "", "  ", np.datetime64("NaT"), NA()]


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("value", MISSING)
@pytest.mark.parametrize("box", [list, tuple, lambda y: np.array(y, dtype=object)], ids=["list", "tuple", "array"])
def test_a_missing_label_is_named_by_its_row(value, box):
    labels = [*TEXTS[:5], value, *TEXTS[6:]]
    for use in (LinearProbe(1.0).fit, LinearProbe(1.0).fit(ROWS, TEXTS).score):
        with pytest.raises(UserError, match="row 5") as raised:
            use(ROWS, box(labels))
        one_line(raised)


@pytest.mark.parametrize("labels", [np.array([0.0, np.nan] * 6), np.ma.masked_array(NUMBERS, [0, 1] * 6)])
def test_a_missing_number_is_named_by_its_row(labels):
    with pytest.raises(UserError, match="row 1"):
        LinearProbe(1.0).fit(ROWS, labels)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["cat", "dog", "über", "nan", "None", "0"]), min_size=2, max_size=30), st.data())
def test_any_list_of_texts_is_itself_unless_a_label_is_missing(texts, data):
    assert label_array(texts, "y").tolist() == texts
    row = data.draw(st.integers(0, len(texts) - 1))
    hole = data.draw(st.sampled_from(MISSING))
    with pytest.raises(UserError, match=f"row {row} has no label"):
        label_array([*texts[:row], hole, *texts[row + 1 :]], "y")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", 1] * 6, "text and other values mixed: 'cat' and 1"),
        ([b"cat", b"dog"] * 6, "bytes"),
        ([0.5, 1.5] * 6, "continuous"),
        (np.array(["2020-01-01", "2021-01-01"] * 6, "datetime64[D]"), "date"),
        (TEXTS[:5], "12 feature rows but 5 labels"),
        ([["cat"], ["dog", "cow"]], "no array"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_meant_are_one_line(labels, message):
    with pytest.raises(UserError, match=message) as raised:
        LinearProbe(1.0).fit(ROWS, labels)
    one_line(raised)


@pytest.mark.parametrize(
    ("fitted", "scored", "message"),
    [
        (TEXTS, NUMBERS, "labels y are numbers .the first is 0., the classes are text .cat, cow, dog."),
        ([str(n) for n in NUMBERS], NUMBERS, "labels y are numbers"),
        (NUMBERS, [str(n) for n in NUMBERS], "labels y are text .the first is '0'., the classes are numbers"),
        (NUMBERS, np.array([str(n) for n in NUMBERS], dtype=object), "labels y are text"),
        (TEXTS, [True] * 12, "labels y are numbers"),
        (TEXTS, [*TEXTS[:10], "cart", "doge"], "not among the classifier's: cart, doge"),
        (NUMBERS, [7, 8, 9, 10, 11, 12] * 2, "7, 8, 9, 10, 11 and 1 more"),
        (TEXTS, TEXTS[:3], "12 feature rows but 3 labels"),
    ],
)
def test_a_probe_never_scores_labels_of_another_kind_as_wrong(fitted, scored, message):
    probe = LinearProbe(1.0).fit(ROWS, fitted)
    with pytest.raises(UserError, match=message) as raised:
        probe.score(ROWS, scored)
    one_line(raised)


@pytest.mark.parametrize(
    "box", [list, np.array, lambda y: np.array(y, dtype=object), lambda y: [np.str_(one) for one in y]]
)
def test_the_same_texts_in_any_container_have_the_same_score(box):
    probe = LinearProbe(1.0).fit(ROWS, TEXTS)
    assert probe.score(ROWS, box(TEXTS)) == np.mean(probe.predict(ROWS) == np.array(TEXTS))


@pytest.mark.parametrize("kind", [int, float, np.int8, np.uint64])
def test_numbers_of_any_type_are_compared_by_value(kind):
    probe = LinearProbe(1.0).fit(ROWS, NUMBERS)
    assert probe.score(ROWS, np.asarray(NUMBERS, kind)) == np.mean(probe.predict(ROWS) == np.array(NUMBERS))


def test_true_and_false_are_one_and_zero():
    truth = np.array(NUMBERS) > 0
    probe = LinearProbe(1.0).fit(ROWS, truth)
    assert probe.score(ROWS, truth) == probe.score(ROWS, truth.astype(int))


def test_several_labels_a_row_must_have_the_shape_of_the_fit():
    truth = np.stack([np.array(NUMBERS) == 1, np.array(NUMBERS) == 2], axis=1)
    probe = LinearProbe(1.0).fit(ROWS, truth)
    assert 0 <= probe.score(ROWS, truth) <= 1
    with pytest.raises(UserError, match=r"give 0 or 1 for each label"):
        probe.score(ROWS, NUMBERS)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_places_are_those_of_a_list(numbers):
    classes = np.array(["ten", "1", "b", "a", "é", "0", "f", "g", "h", "i"])
    labels = [classes[n] for n in numbers]
    assert label_places(labels, classes, "y").tolist() == numbers


# ---- the labels of a zero-shot classifier


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"cat": ["a cat"], "dog": ["a dog"]}, "got a dict .its first key is 'cat'.; give list.d. as labels"),
        ({0: "cat", 1: "dog"}, "got a dict .its first key is 0"),
        ({"cat", "dog"}, "got a set"),
        ((name for name in NAMES), "got a generator"),
        ("cat", "got the text 'cat'"),
        (b"cat", "got the text"),
        ([0, 1], "number 1 is 0, an int"),
        (["cat", None], "number 2 is None"),
        (["cat", float("nan")], "number 2 is nan"),
        (["cat", " "], "number 2 is empty"),
        (["cat", "dog", "cat "], "given twice: cat"),
        (np.array([["cat", "dog"]]), "shape"),
        ([], "there is none"),
    ],
)
def test_labels_of_a_classifier_that_cannot_be_meant_are_one_line(labels, message):
    with pytest.raises(UserError, match=message) as raised:
        ZeroShotClassifier(ColourModel(), labels).fit()
    one_line(raised)


def test_labels_of_a_classifier_may_be_an_array():
    assert check_labels(np.array(["cat", "dog"])) == ["cat", "dog"]


@pytest.mark.parametrize("use", ["predict", "predict_proba"])
def test_one_label_alone_has_no_probability(use):
    classifier = ZeroShotClassifier(ColourModel(), ["red"])
    with pytest.raises(UserError, match="'red' is the only one.*something else") as raised:
        getattr(classifier, use)([square("red")])
    one_line(raised)
    with pytest.raises(UserError, match="the only one"):
        classifier.score([square("red")], ["red"])
    with pytest.raises(UserError, match="the only one"):
        classifier.fit_temperature([square("red")], ["red"])


def test_one_label_with_a_threshold_says_whether_it_fits():
    classifier = ZeroShotClassifier(ColourModel(), ["red"])
    classifier.fit_rejection([square("red")], [square("blue")])
    images = [square("red"), square("blue")]
    assert classifier.fits(images).tolist() == [True, False]
    assert classifier.predict(images).tolist() == ["red", "red"]


def test_a_classifier_never_scores_labels_of_another_kind_as_wrong():
    images = [square("red"), square("blue")]
    classifier = ZeroShotClassifier(ColourModel(), NAMES)
    assert classifier.score(images, ["red", "blue"]) == classifier.score(images, np.array([" red", "blue "])) == 1.0
    for labels, message in (
        ([0, 2], "labels y are numbers"),
        (["red", "pink"], "not among the classifier's: pink"),
        (["red", None], "row 1"),
        (["red"], "2 feature rows but 1 labels"),
    ):
        with pytest.raises(UserError, match=message):
            classifier.score(images, labels)
        with pytest.raises(UserError, match=message):
            classifier.fit_temperature(images, labels)


# ---- class numbers


@pytest.mark.parametrize("target", [TEXTS, [str(n) for n in NUMBERS], [None] * 12, [0.5] * 12, [0, -1] * 6])
def test_class_numbers_are_asked_for_everywhere(target):
    scores = np.random.default_rng(0).random((12, 3))
    uses = (
        lambda: knn_sweep(ROWS, target, ROWS, target),
        lambda: few_shot(ROWS, target, ROWS, target, shots=[1]),
        lambda: temperature(scores, target),
        lambda: expected_error(scores, target),
    )
    for use in uses:
        with pytest.raises(UserError) as raised:
            use()
        one_line(raised)


def test_a_number_beyond_the_classes_is_refused():
    with pytest.raises(UserError, match="row 1 has class 3, but there are 3"):
        temperature(np.random.default_rng(0).random((2, 3)), [0, 3])


def test_neighbours_refuse_a_test_class_without_training_images():
    with pytest.raises(UserError, match="without training images: 9"):
        knn_sweep(ROWS, NUMBERS, ROWS[:2], [0, 9])


@pytest.mark.parametrize("truth", [[["0", "1"]], [[0.5, 1]], [[np.nan, 1]], [[2, 1]]])
def test_the_truth_of_several_labels_is_zero_or_one(truth):
    with pytest.raises(UserError):
        label_thresholds([[0.1, 0.2]], truth)


# ---- classes that are numbers


def test_numbers_are_in_their_own_order():
    assert in_order(["10", "2", "1", "2"]) == ["1", "2", "10"]
    assert in_order(["10", "2", "b"]) == ["10", "2", "b"]
    assert number_remark(["1", "2", "10"]) and not number_remark(["1", "two"])


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["1", "2", "10"], {"1": "cat", "2": "dog", "10": "cow", "11": "hen"}, ["cat", "dog", "cow"]),
        (["n01", "n02"], {"n01": "tench", "n02": "shark"}, ["tench", "shark"]),
        (["0", "1", "2"], ["a", "b", "c"], ["a", "b", "c"]),
        (["1", "2", "3"], ["a", "b", "c"], ["a", "b", "c"]),
        (["0", "2"], ["a", "b", "c"], ["a", "c"]),
        (["1", "10"], [f"n{number}" for number in range(1, 11)], ["n1", "n10"]),
    ],
)
def test_classes_get_their_names(labels, names, expected):
    mapping = class_name_map(labels, names)
    assert [mapping[label] for label in labels] == expected


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["1", "2"], {"1": "cat"}, "no name for 2"),
        (["1", "2"], {"1": "cat", "2": "cat"}, "'cat' is the name of 1 and 2"),
        (["1", "2"], {"1": "cat", "2": " "}, "empty"),
        (["1", "2"], ["a", "b", "c"], "may begin at 0 or at 1"),
        (["1", "7"], ["a", "b"], "do not fit"),
        (["a", "b"], ["x", "y"], "classes that are numbers, got 'a'"),
    ],
)
def test_names_that_do_not_fit_are_one_line(labels, names, message):
    with pytest.raises(UserError, match=message) as raised:
        class_name_map(labels, names)
    one_line(raised)


def test_an_evaluation_names_the_classes(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        for shade in range(3):
            square(name, shade).save(tmp_path / "data" / str(number) / f"{shade}.png")
    data = tmp_path / "data"
    bare = evaluate_labelled(ColourModel(), "colours", None, data, ["zeroshot"]).results
    assert any("labels are numbers (0, 1, 2, …)" in line for line in bare["remarks"])
    named = evaluate_labelled(ColourModel(), "colours", None, data, ["zeroshot"], class_names=NAMES).results
    assert named["zeroshot"]["top1"]["value"] == 1.0 and "remarks" not in named
    assert sorted(named["zeroshot"]["names"]) == sorted(NAMES)
    json.dumps(named)


def test_one_class_is_refused_by_zero_shot(model, labelled):
    for name in NAMES[1:]:
        shutil.rmtree(labelled / name)
    with pytest.raises(UserError, match="'red' is the only one.*at least two classes"):
        evaluate_labelled(model, "one", None, labelled, ["zeroshot"])


def test_labels_that_differ_in_case_alone_are_remarked(model, labelled, tmp_path):
    (labelled / "Red").mkdir()
    square("red").save(labelled / "Red" / "1.png")
    found = evaluate_labelled(model, "case", None, labelled, ["zeroshot"]).results
    assert any("'Red' and 'red' differ in spelling alone" in line for line in found["remarks"])
    assert contrastive.evaluation.reader_warnings({"case": found})[0].startswith("case: labels")


@pytest.mark.parametrize(
    "labels", [["-1", "1"], ["+1", "1"], ["1.5", "15", "1 5"], ["0-9", "0 9"], ["C", "C++", "C#"], ["A", "A-", "A+"]]
)
def test_signs_and_numbers_are_not_spelling(labels):
    assert spelling_remarks(np.array(labels)) == []


def test_case_and_punctuation_are_spelling_and_names_are_shown_plainly():
    remarks = spelling_remarks(np.array(["T-shirt", "t shirt", "-1", "1", "cat!", "cat"]))
    assert remarks == [
        "labels 'T-shirt' and 't shirt' differ in spelling alone",
        "labels 'cat!' and 'cat' differ in spelling alone",
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [("cat", r"got the text 'cat'; give several labels, as \['cat', 'other'\]"), (np.array([3, 4]), "1 is 3, an int")],
)
def test_labels_of_a_wrong_type_are_named_plainly(labels, message):
    with pytest.raises(UserError, match=message):
        check_labels(labels)
