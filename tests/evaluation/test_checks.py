import shutil

import numpy as np
import pytest
import torch

from contrastive.errors import UserError
from contrastive.evaluation import evaluate_labelled, evaluate_pairs, few_shot, knn_sweep, template_spread
from contrastive.evaluation.cautions import reader_warnings
from contrastive.evaluation.checks import check_finite, check_known, check_trained, possible_shots
from tests.evaluation.fake import ColourModel

LABELS = ["red"] * 5 + ["blue"] * 3 + ["green"] * 9


def test_the_usual_shots_end_where_the_smallest_class_does():
    assert possible_shots("set", LABELS, None, (1, 2, 4, 8, 16)) == [1, 2]
    assert possible_shots("set", LABELS, [3, 1, 3], (1, 2, 4)) == [1, 3]


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ([1, 4], r"set: shots: 4 asked for, but blue has 3 training images; ask for at most 3"),
        ([0, 2], r"shots: 0: give numbers from 1 up"),
        ([], r"shots: none: give numbers from 1 up"),
    ],
)
def test_shots_that_cannot_be_drawn_are_told_with_the_class(shots, message):
    with pytest.raises(UserError, match=message):
        possible_shots("set", LABELS, shots, (1, 2))


def test_a_class_without_training_images_is_named():
    with pytest.raises(UserError, match="labels without training images in train: pink; take them out or train"):
        check_trained("set", "train", LABELS, ["red", "pink"])
    with pytest.raises(UserError, match="one class only, red"):
        check_trained("set", "train", ["red", "red"], ["red"])
    check_trained("set", "train", LABELS, ["red"])


def test_a_misspelt_label_is_shown_beside_the_one_it_resembles():
    with pytest.raises(UserError, match="blue, green; did you mean 'blue' by 'bleu'"):
        check_known("set", np.array(LABELS), ["red", "bleu"])


def test_the_first_row_that_is_not_finite_is_named():
    rows = np.zeros((3, 2), np.float32)
    check_finite("set", ["a", "b", "c"], rows)
    rows[1, 0], rows[2, 1] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 3 feature rows are not finite, the first is that of b"):
        check_finite("set", ["a", "b", "c"], rows)


class Broken(ColourModel):
    def encode_image(self, pixels):
        return super().encode_image(pixels) * torch.nan


def test_features_that_are_not_numbers_end_an_evaluation(labelled, pairs):
    with pytest.raises(UserError, match="48 of 48 feature rows are not finite, the first is that of blue/00"):
        evaluate_labelled(Broken(), "colours", None, labelled, ["zeroshot"])
    with pytest.raises(UserError, match="not finite, the first is that of 0.png"):
        evaluate_pairs(Broken(), pairs)


def test_a_class_that_was_not_trained_ends_an_evaluation(model, labelled, tmp_path):
    shutil.copytree(labelled, tmp_path / "train")
    shutil.rmtree(tmp_path / "train" / "red")
    for tasks in (["probe"], ["fewshot"], ["knn"]):
        with pytest.raises(UserError, match="labels without training images in .*: red"):
            evaluate_labelled(model, "colours", tmp_path / "train", labelled, tasks)


def test_a_reader_is_warned_of_a_strength_on_the_border_of_unread_images_and_of_few_shots():
    probe = {"model": {"C": 100.0, "validation_curve": [(1.0, 0.5), (100.0, 0.7)]}}
    found = {"samples": 10, "probe": probe, "rejected": {"not an image": 2}, "fewshot": [], "shots": [1, 2]}
    border, shots, unread = reader_warnings({"set": found})
    assert "C = 100, is the largest that was tried" in border and "2 images could not be read" in unread
    assert "few shots end at 2" in shots
    probe["model"]["validation_curve"].append((1000.0, 0.6))
    assert reader_warnings({"set": {"samples": 10, "probe": probe}}) == []


def test_shots_that_were_asked_for_are_no_warning():
    found = {"samples": 10, "fewshot": [], "shots": [1, 2], "shots_asked": True}
    assert reader_warnings({"set": found}) == []


def test_a_tower_that_cannot_tell_orders_apart_is_said():
    ties = {"model": {"value": 0.0, "optimistic": 1.0}, "blind": {"value": 0.0}}
    (line,) = reader_warnings({"set": {"samples": 10, "composition": ties}})
    assert "order is lost" in line


@pytest.mark.parametrize("where", ["few_shot", "knn", "template_spread"])
def test_labels_in_place_of_class_numbers_are_told(where):
    rows, names = np.eye(4, dtype=np.float32), ["a", "b", "a", "b"]
    calls = {
        "few_shot": lambda: few_shot(rows, names, rows, names, None, shots=(1,)),
        "knn": lambda: knn_sweep(rows, names, rows, names),
        "template_spread": lambda: template_spread(ColourModel(), rows[:, :3], names, ["a", "b"], "openai7"),
    }
    with pytest.raises(UserError, match="numbers of classes; give np.unique"):
        calls[where]()
