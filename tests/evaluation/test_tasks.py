import json

import numpy as np
import pytest
from PIL import Image

from contrastive.errors import UserError
from contrastive.evaluation import (
    embed,
    evaluate_labelled,
    evaluate_pairs,
    format_results_table,
    probe_with_controls,
)
from contrastive.shards import open_index, open_source, write_shards
from tests.evaluation.fake import NAMES, ColourModel, square


def test_pairs_whose_captions_repeat_are_all_found(model, pairs):
    found = evaluate_pairs(model, pairs, name="val").results
    assert (found["name"], found["kind"], found["samples"], found["captions"]) == ("val", "pairs", 8, 4)
    for direction in ("image_to_text", "text_to_image"):
        assert found["retrieval"][direction]["recall@1"]["value"] == 1.0
    assert found["zeroshot"]["top1"] == {"value": 1.0, "low": 1.0, "high": 1.0, "chance": 0.25}
    json.dumps(found)


def test_zero_shot_on_pairs_equals_brute_force(model, pairs):
    (pairs / "0.txt").write_text("Blue  square")  # wrong, and the same caption as that of image 2
    (pairs / "1.txt").write_text("yellow square")
    found = embed(model, pairs)
    names = ["blue square", "yellow square", "red square", "green square"]
    rows = {name: index for index, name in enumerate(names)}
    texts = np.stack([found.text[found.captions.index(c)] for c in ("Blue  square", *names[1:])])
    target = [rows[" ".join(caption.lower().split())] for caption in found.captions]
    expected = ((found.image @ texts.T).argmax(axis=1) == target).mean()
    results = evaluate_pairs(model, pairs).results
    assert results["captions"] == 4
    assert results["zeroshot"]["top1"]["value"] == expected == 0.75


def test_a_source_without_captions_is_told(model, labelled):
    with pytest.raises(UserError, match=r"48 of 48 images have no caption, the first is blue/00"):
        evaluate_pairs(model, labelled)


def test_scalars_of_pairs_are_plain_numbers_to_log(model, pairs):
    scalars = evaluate_pairs(model, pairs).scalars()
    assert scalars["image_to_text/recall@1"] == 1.0 and scalars["zeroshot/top5"] == 1.0
    assert len(scalars) == 8


@pytest.mark.parametrize("sharded", [True, False])
def test_examples_show_the_images_that_they_name(model, pairs, tmp_path, sharded):
    (pairs / "0.txt").write_text("blue square")
    source = pairs
    if sharded:
        write_shards(open_source(pairs), tmp_path / "shards")
        source = open_index(tmp_path / "shards")
    examples = evaluate_pairs(model, source, examples=10).examples
    (wrong,) = examples.wrong
    assert wrong.image.getpixel((0, 0)) == (255, 0, 0)
    assert wrong.truth == "blue square" and wrong.guesses[0][0] == "red square"
    assert len(examples.right) == 7 and all(case.truth == case.guesses[0][0] for case in examples.right)
    hits = next(hits for hits in examples.hits if hits.caption == "green square")
    assert [right for _, _, right in hits.images] == [True] * 2 + [False] * 6
    assert hits.images[0][0].getpixel((0, 0))[1] > 100


def test_a_labelled_set_gets_zero_shot_and_probe_with_controls(model, labelled):
    def random_model():
        return ColourModel()

    results = evaluate_labelled(
        model, "colours", labelled, labelled, random_model=random_model, templates=["{}", "a {} square"]
    ).results
    assert (results["samples"], results["classes"], results["templates"]) == (48, 4, ["{}", "a {} square"])
    assert results["wording"]["ensemble"]["value"] == results["zeroshot"]["top1"]["value"]
    table = format_results_table({"sets": {"colours": results}})
    assert "by names alone" in table and "single templates, mean and extremes" in table
    assert results["zeroshot"]["top1"]["value"] == results["zeroshot"]["mean_per_class"]["value"] == 1.0
    probe = results["probe"]
    assert [probe[name]["width"] for name in ("model", "random", "pixels")] == [48, 48, 3 * 12 * 12]
    assert all(probe[name]["top1"]["value"] == 1.0 for name in ("model", "random", "pixels"))
    json.dumps(results)


def test_labels_may_be_more_than_the_set_holds(model, labelled):
    results = evaluate_labelled(model, "c", None, labelled, ["zeroshot"], labels=[*NAMES, "red blue"]).results
    assert results["classes"] == 5 and results["zeroshot"]["top1"]["chance"] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["zeroshot", "fewshot"]}, "fewshot"),
        ({"tasks": ["probe"]}, "training set"),
        ({"tasks": ["zeroshot"], "labels": ["red", "green"]}, "blue, yellow"),
    ],
)
def test_a_task_that_cannot_be_done_is_told(model, labelled, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_labelled(model, "colours", None, labelled, **options)


def test_a_set_without_labels_is_told(model, pairs):
    with pytest.raises(UserError, match="no labels"):
        evaluate_labelled(model, "pairs", None, pairs, ["zeroshot"])


def test_pixels_are_grey_rows_where_all_images_are_grey(model, tmp_path):
    for name, value in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (10, 9), value + number).save(tmp_path / name / f"{number}.png")
    outcome = probe_with_controls(model, tmp_path, tmp_path, C=1.0)
    assert outcome.results["pixels"]["width"] == 9 * 9 and "random" not in outcome.results


def test_a_probe_without_test_set_is_only_fitted(model, labelled):
    outcome = probe_with_controls(model, labelled, None, C=[0.1, 1.0])
    assert "top1" not in outcome.results["model"] and outcome.results["model"]["C"] == outcome.probe.C_
    assert outcome.probe.score(embed(model, labelled, features="tower").image, embed(model, labelled).labels) == 1


def test_a_test_label_that_was_not_trained_on_is_told(model, labelled, tmp_path):
    for name in ("red", "pink"):
        (tmp_path / "test" / name).mkdir(parents=True)
        square("red").save(tmp_path / "test" / name / "0.png")
    with pytest.raises(UserError, match="pink"):
        probe_with_controls(model, labelled, tmp_path / "test", C=1.0)


def test_labels_never_leak_from_the_test_set_into_the_choice_of_strength(model, labelled, tmp_path):
    for index, name in enumerate(NAMES):  # a test set whose labels are all wrong
        (tmp_path / "test" / name).mkdir(parents=True)
        square(NAMES[index - 1]).save(tmp_path / "test" / name / "0.png")
    with_test = probe_with_controls(model, labelled, tmp_path / "test").probe
    without = probe_with_controls(model, labelled, None).probe
    assert with_test.C_ == without.C_
    # the same solver on the same rows, which may lie otherwise in memory: it stops within its tolerance
    np.testing.assert_allclose(with_test.coef_, without.coef_, rtol=1e-3, atol=1e-6)
