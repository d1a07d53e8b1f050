"""`contrastive classify` beyond labels: the file, lint, "none of these", several labels."""

import json

import numpy as np
import pytest

import contrastive
from tests.evaluation.fake import NAMES, square
from tests.evaluation.test_commands import command, save_random_model

PARENTS = {"red": "warm", "yellow": "warm", "blue": "cold"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), 0)


def rows_of(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_saved_classifier_gives_the_same_rows_without_the_text_tower(saved, pairs, tmp_path, capsys, monkeypatch):
    file = tmp_path / "classifier.safetensors"
    options = ("--format", "json", "--top-k", 2)
    labels = ("--labels", ",".join(NAMES), "--templates", "general")
    assert command("classify", saved, pairs, *labels, "--save", file, *options) == 0
    first = rows_of(capsys)
    built = []
    tower = contrastive.models.TransformerTextTower
    monkeypatch.setattr(tower, "__init__", lambda *a, **k: built.append(1))
    assert command("classify", saved, pairs, "--classifier", file, *options) == 0
    second = rows_of(capsys)
    assert not built
    assert [row["label"] for row in second] == [row["label"] for row in first]
    np.testing.assert_allclose(*([row["probability"] for row in rows] for rows in (first, second)), rtol=1e-5)


def test_another_models_classifier_is_one_line_with_both_hashes(saved, pairs, tmp_path, capsys):
    file, other = tmp_path / "c.safetensors", save_random_model(tmp_path / "other", 1)
    command("classify", saved, pairs, "--labels", "red,blue", "--save", file)
    capsys.readouterr()
    assert command("classify", other, pairs, "--classifier", file) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for model in (saved, other):
        assert contrastive.models.fingerprint(contrastive.load(model)) in error


def test_validation_calibrates_and_the_file_keeps_it(saved, labelled, tmp_path, capsys):
    file = tmp_path / "c.safetensors"
    options = ("--labels", ",".join(NAMES), "--validation", labelled, "--reject", "--save", file)
    assert command("classify", saved, labelled, *options, "--format", "json") == 0
    out, err = capsys.readouterr()
    assert "calibration error" in err and "none of these: threshold" in err
    opened = contrastive.load_classifier(file, saved)
    assert opened.temperature_ != 1
    refused = [row["image"] for row in json.loads(out) if row["label"] == "none of these"]
    keys = contrastive.embed(contrastive.load(saved), labelled).keys
    assert refused == [key for key, fits in zip(keys, opened.fits(labelled), strict=True) if not fits]
    assert 0 < len(refused) <= 0.05 * len(keys) + 1


def test_images_of_none_of_the_labels_choose_the_threshold(saved, labelled, pairs, capsys):
    options = ("--labels", ",".join(NAMES), "--validation", labelled, "--unknown", pairs, "--reject")
    assert command("classify", saved, pairs, *options) == 0
    assert "auroc" in capsys.readouterr().err


def test_several_labels_an_image(saved, labelled, pairs, tmp_path, capsys):
    model = contrastive.load(saved)
    found = contrastive.embed(model, labelled)
    truth = np.asarray(found.labels)[:, None] == np.asarray(NAMES)
    classifier = contrastive.ZeroShotClassifier(model, NAMES).fit_thresholds(found.image, truth)
    classifier.save(tmp_path / "c.safetensors")
    options = ("--classifier", tmp_path / "c.safetensors", "--multilabel", "--format", "json")
    assert command("classify", saved, pairs, *options) == 0
    rows = rows_of(capsys)
    for key, labels in zip([f"{n}.png" for n in range(8)], classifier.predict_labels(pairs), strict=True):
        own = {row["label"] for row in rows if row["image"] == key} - {None}
        assert own == set(np.asarray(NAMES)[labels])


def test_validation_chooses_the_thresholds_of_several_labels(saved, tmp_path, capsys):
    for name, label in (("a", "red"), ("b", "red; blue"), ("c", "green"), ("d", "blue")):
        square(label.split(";")[0]).save(tmp_path / f"{name}.png")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\na.png,red\nb.png,red; blue\nc.png,green\nd.png,blue\n")
    options = ("--labels", ",".join(NAMES), "--multilabel", "--validation", table, "--save", tmp_path / "c.safetensors")
    assert command("classify", saved, tmp_path / "a.png", *options) == 0
    assert "thresholds of 4 labels on 4 validation images: micro-averaged F1" in capsys.readouterr().err
    opened = contrastive.load_classifier(tmp_path / "c.safetensors", saved)
    names = (["red"], ["red", "blue"], ["green"], ["blue"])
    truth = np.asarray([[name in own for name in NAMES] for own in names])
    found = contrastive.embed(contrastive.load(saved), table)
    expected = contrastive.ZeroShotClassifier(contrastive.load(saved), NAMES).fit_thresholds(found.image, truth)
    np.testing.assert_allclose(opened.thresholds_, expected.thresholds_, rtol=1e-5)


def test_a_level_of_the_hierarchy_is_the_sum_below_it(saved, pairs, tmp_path, capsys):
    (tmp_path / "parents.json").write_text(json.dumps(PARENTS))
    options = ("--labels", ",".join(NAMES), "--format", "json")
    assert command("classify", saved, pairs, *options, "--parents", tmp_path / "parents.json", "--level", 1) == 0
    above = rows_of(capsys)
    assert command("classify", saved, pairs, *options) == 0
    below = rows_of(capsys)
    for row in above:
        own = [
            r["probability"]
            for r in below
            if r["image"] == row["image"] and PARENTS.get(r["label"], r["label"]) == row["label"]
        ]
        assert row["probability"] == pytest.approx(sum(own), rel=1e-5)


def test_a_file_remembers_that_its_images_were_inverted(saved, labelled, pairs, tmp_path, capsys):
    file, labels = tmp_path / "c.safetensors", ("--labels", ",".join(NAMES))
    assert command("classify", saved, pairs, *labels, "--invert", "--save", file, "--format", "json") == 0
    first = rows_of(capsys)
    assert command("classify", saved, pairs, "--classifier", file, "--format", "json") == 0
    out, err = capsys.readouterr()
    assert "inverted" in err
    np.testing.assert_allclose(
        [row["probability"] for row in json.loads(out)], [row["probability"] for row in first], rtol=1e-5
    )


def test_lint_is_one_line_a_finding_on_the_error_stream(saved, pairs, capsys):
    assert command("classify", saved, pairs, "--labels", "red,RED,blue", "--format", "json") == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert "warning: labels 'red' and 'RED' differ in spelling alone\n" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "red,blue", "--reject"), "--validation"),
        (("--labels", "red,blue", "--multilabel"), "--validation"),
        (("--labels", "red,blue", "--multilabel", "--reject"), "use one"),
        (("--labels", "red,blue", "--unknown", "x"), "--validation"),
        (("--labels", "red,blue", "--level", "1"), "levels 0 to 0"),
        (("--labels", "red,blue", "--parents", "none.json"), "no JSON"),
        (("--labels", "red,blue", "--multilabel", "--level", "1"), "use one"),
        (("--classifier", "c.safetensors", "--parents", "p.json"), "has its own"),
        (("--classifier", "missing.safetensors"), "no such file"),
        (("--classifier", "c.safetensors", "--templates", "short"), "has its own"),
    ],
)
def test_options_that_cannot_be_meant_end_with_one_line(saved, pairs, capsys, options, message):
    assert command("classify", saved, pairs, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
