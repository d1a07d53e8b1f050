"""Two classes, three, and many go through every task, table, figure, comparison and saved file alike."""

import colorsys
import json

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

import contrastive
from contrastive.evaluation import LinearProbe, evaluate_labelled, few_shot, knn_sweep
from contrastive.evaluation.probed import fit_probes, judge_probe
from tests.evaluation.test_commands import command, save_random_model

COUNTS = [2, 3, 7]
IMAGES = 4  # of each class


def names(classes):
    return [f"kind {chr(ord('a') + number)}" for number in range(classes)]


def write_set(folder, classes, seed):
    """`IMAGES` noisy squares of each class, in a hue of its own; one sub-folder a class."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(names(classes)):
        (folder / name).mkdir(parents=True)
        colour = 255 * np.asarray(colorsys.hsv_to_rgb(number / classes, 0.8, 0.8))
        for index in range(IMAGES):
            pixels = np.clip(colour + random.normal(0, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [save_random_model(tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module", params=COUNTS, ids=lambda classes: f"{classes}-classes")
def sets(request, tmp_path_factory):
    """The number of classes, a training set and a test set."""
    folder = tmp_path_factory.mktemp("sets")
    return request.param, write_set(folder / "train", request.param, 0), write_set(folder / "test", request.param, 1)


def every_share(found):
    """All values, bounds and chances of a result that must lie in 0 to 1."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name in ("value", "low", "high", "chance") and isinstance(value, float):
                yield value
            else:
                yield from every_share(value)
    elif isinstance(found, list):
        for one in found:
            yield from every_share(one)


def test_every_task_is_evaluated_and_written(models, sets, tmp_path, capsys):
    classes, train, test = sets
    out = tmp_path / "out"
    options = ("--train", train, "--tasks", "zeroshot,probe,fewshot,knn,retrieval", "--output", out, "--shots", "1,2")
    assert command("evaluate", models[0], test, *options) == 0
    results = json.loads((out / "results.json").read_text())["sets"]["test"]
    assert results["classes"] == classes
    for task in ("zeroshot", "probe"):
        judged = results[task]
        assert np.shape(judged["confusion"]) == (classes, classes) and np.sum(judged["confusion"]) == classes * IMAGES
        assert judged["names"] == names(classes) and len(judged["per_class"]) == classes
        assert ("top5" in judged) == (classes > 5)
        assert sum(bin["samples"] for bin in judged["reliability"]) == classes * IMAGES
        right = np.trace(judged["confusion"]) / (classes * IMAGES)
        assert judged["top1"]["value"] == pytest.approx(right)
        assert judged["top1"]["chance"] == judged["mean_per_class"]["chance"] == 1 / classes
        assert {"before", "after", "temperature"} <= set(judged["calibration"])
    for control in ("model", "random", "pixels"):
        assert results["probe"][control]["top1"]["chance"] == 1 / classes
    tasks = {name: results[name] for name in ("zeroshot", "probe", "fewshot", "knn")}
    assert all(0 <= share <= 1 for share in every_share(tasks))
    table = pyarrow.parquet.read_table(out / "predictions.parquet").to_pylist()
    for row in table:
        for task in ("zeroshot", "probe"):
            shown = row[f"{task}_labels"]
            assert len(shown) == len(set(shown)) == min(5, classes) and row[task] == shown[0]
            assert row[f"{task}_probabilities"] == sorted(row[f"{task}_probabilities"], reverse=True)
            assert classes > 5 or sum(row[f"{task}_probabilities"]) == pytest.approx(1, abs=1e-5)
    page = (out / "report.html").read_text()
    for title in ("taken for what", "class by class", "few shots", "nearest neighbours"):
        assert title in page


def test_two_models_are_compared(models, sets, capsys):
    _, train, test = sets
    options = ("--compare", "--train", train, "--tasks", "zeroshot,probe,knn")
    assert command("evaluate", *models, test, *options) == 0
    out = capsys.readouterr().out
    for measure in ("zeroshot/top1", "zeroshot/log-likelihood", "probe/top1", "probe/log-likelihood"):
        assert measure in out


def test_a_probe_is_fitted_beside_its_controls_saved_and_used(models, sets, tmp_path, capsys):
    classes, train, test = sets
    file = tmp_path / "probe.safetensors"
    assert command("probe", "fit", models[0], train, file, "--test", test, "--partial", "0.5,1") == 0
    assert f"{classes} classes" in capsys.readouterr().out
    probe = LinearProbe.load(file)
    results = probe.metadata_["results"]
    assert [part["samples"] for part in results["partial"]] == [classes * IMAGES // 2, classes * IMAGES]
    assert all(part["top1"]["chance"] == 1 / classes for part in results["partial"])
    assert command("probe", "predict", file, test, "--top-k", classes, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == classes * classes * IMAGES
    features = contrastive.embed(contrastive.load(models[0]), test, features="tower").image
    assert [row["label"] for row in rows if row["rank"] == 1] == probe.predict(features).tolist()


def test_labels_are_calibrated_rejected_and_saved(models, sets, tmp_path, capsys):
    classes, train, test = sets
    file = tmp_path / "classifier.safetensors"
    options = ("--labels", ",".join(names(classes)), "--validation", train, "--unknown", test, "--reject")
    assert command("classify", models[0], test, *options, "--save", file) == 0
    said = capsys.readouterr().err
    assert "calibration error" in said and "auroc" in said
    opened = contrastive.load_classifier(file, models[0])
    images = contrastive.embed(opened.model, test).image
    assert opened.predict_proba(images).shape == (classes * IMAGES, classes)
    assert command("classify", models[0], test, "--classifier", file, "--reject") == 0


def test_several_labels_an_image_get_thresholds(models, sets, tmp_path, capsys):
    classes, train, test = sets
    file = tmp_path / "classifier.safetensors"
    options = ("--labels", ",".join(names(classes)), "--validation", train, "--multilabel")
    assert command("classify", models[0], test, *options, "--save", file) == 0
    assert f"thresholds of {classes} labels" in capsys.readouterr().err
    assert contrastive.load_classifier(file).thresholds_.shape == (classes,)


@pytest.fixture(params=COUNTS)
def rows(request):
    """Features of a training and a test set, and their class numbers."""
    random = np.random.default_rng(0)
    middle = random.normal(0, 1, (request.param, 8))
    target = np.repeat(np.arange(request.param), 12)
    train, test = (middle[target] + random.normal(0, 1.5, (len(target), 8)) for _ in range(2))
    return request.param, train, test, target


def test_the_probe_of_an_evaluation_is_judged_by_its_logits(rows):
    classes, train, test, target = rows
    labels = np.asarray(names(classes))[target]
    probe, measured = fit_probes({"model": (train, test)}, labels, labels)
    judged = judge_probe(probe, train, labels, test, labels)
    assert judged.names == names(classes) and judged.probabilities.shape == (len(test), classes)
    assert judged.results["top1"]["value"] == measured["model"]["top1"]["value"] == probe.score(test, labels)
    np.testing.assert_array_equal(judged.right, probe.predict(test) == labels)


def test_logits_have_a_column_a_class_and_the_decision_function_is_scikit_learns(rows):
    classes, train, test, target = rows
    probe = LinearProbe(1.0, tol=1e-12).fit(train, target)
    assert probe.logits(test).shape == (len(test), classes)
    # two rows of weights with their own penalties are scikit-learn's one at twice the strength
    oracle = LogisticRegression(C=2.0 if classes == 2 else 1.0, tol=1e-10, max_iter=100_000).fit(train, target)
    scores, expected = probe.decision_function(test), oracle.decision_function(test)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(probe.predict_proba(test), oracle.predict_proba(test), atol=1e-4)
    if classes > 2:  # scikit-learn leaves a common part free
        expected = expected - expected.mean(axis=1, keepdims=True) + scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, atol=1e-3)  # both stop when their gradient is small


def test_few_shots_and_neighbours_take_any_number_of_classes(rows):
    classes, train, test, target = rows
    found = few_shot(
        train, target, test, target, np.random.default_rng(1).normal(size=(8, classes)), shots=[1, 2], seeds=3
    )
    assert {row["method"] for row in found} >= {"probe", "anchored", "prototypes", "tip-adapter", "zero-shot"}
    assert all(0 <= row["top1"]["value"] <= 1 for row in found)
    assert knn_sweep(train, target, test, target)["top1"]["value"] > 1 / classes


@pytest.mark.parametrize("images", [1, 2])
def test_two_classes_with_hardly_any_images_end_with_a_result_or_one_line(models, tmp_path, capsys, images):
    for folder in ("train", "test"):
        for colour in ("red", "blue"):
            (tmp_path / folder / colour).mkdir(parents=True)
            for index in range(images):
                Image.new("RGB", (16, 16), colour).save(tmp_path / folder / colour / f"{index}.png")
    options = ("--train", tmp_path / "train", "--tasks", "zeroshot,probe,fewshot,knn,retrieval")
    code = command("evaluate", models[0], tmp_path / "test", *options)
    error = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in error
    assert code == 0 or error.count("\n") == 1


def test_one_class_is_refused_by_what_learns(models, tmp_path, capsys):
    data = write_set(tmp_path / "one", 1, 0)
    assert command("evaluate", models[0], data, "--train", data, "--tasks", "probe") == 2
    assert "one class only" in capsys.readouterr().err


def test_a_grouped_evaluation_of_two_classes_keeps_the_log_likelihood_of_each_image(models, tmp_path):
    train, test = write_set(tmp_path / "train", 2, 0), write_set(tmp_path / "test", 2, 1)
    found = evaluate_labelled(contrastive.load(models[0]), "two", train, test, ["probe"])
    table = found.predictions.tasks["probe"][1]
    place = [names(2).index(label) for label in found.predictions.truth]
    np.testing.assert_allclose(
        found.samples["probe/log-likelihood"], np.log(table[np.arange(len(place)), place]), rtol=1e-6
    )
