"""`classify`, `probe` and `evaluate` through the command line, on a small model with random weights."""

import csv
import io
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch

import contrastive
from contrastive.cli import main
from contrastive.models import (
    CorpusTokenizer,
    TimmImageTower,
    TransformerTextTower,
    TwoTower,
    save_model,
    train_tokenizer,
)
from tests.evaluation.fake import NAMES


def save_random_model(folder, seed):
    torch.manual_seed(seed)
    tokenizer = CorpusTokenizer(train_tokenizer(NAMES * 3, vocab_size=330), context=8)
    kwargs = {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)}
    image = TimmImageTower("resnet18", 16, 32, kwargs=kwargs)
    text = TransformerTextTower(tokenizer.vocab_size, 16, 8, width=16, depth=1, heads=2, pad_id=tokenizer.pad_id)
    return str(save_model(TwoTower(image, text, tokenizer, 16), folder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), 0)


def command(*arguments):
    return main([str(argument) for argument in arguments])


def test_classify_gives_the_probabilities_of_the_classifier(saved, pairs, capsys):
    assert command("classify", saved, pairs, "--labels", "red, blue,green", "--top-k", 2, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    classifier = contrastive.ZeroShotClassifier(contrastive.load(saved), ["red", "blue", "green"])
    expected = np.sort(classifier.predict_proba(pairs), axis=1)[:, ::-1][:, :2]
    assert [row["image"] for row in rows] == [f"{number}.png" for number in range(8) for _ in range(2)]
    np.testing.assert_allclose([row["probability"] for row in rows], expected.ravel(), rtol=1e-4)
    best = [row["label"] for row in rows if row["rank"] == 1]
    assert best == classifier.predict(pairs).tolist()


def test_classify_reports_an_unreadable_image_in_its_row_and_goes_on(saved, pairs, tmp_path, capsys):
    bad = pairs / "bad.png"
    bad.write_bytes(b"no image")
    out = tmp_path / "out.csv"
    (tmp_path / "labels.txt").write_text("red\n\nblue\n")
    images = (pairs / "0.png", bad, pairs / "none.png")
    options = ("--labels-file", tmp_path / "labels.txt", "--format", "csv", "--output", out, "--top-k", 1)
    assert command("classify", saved, *images, *options) == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["error"] for row in rows] == ["", "not an image", "no such file or directory"]
    assert rows[0]["label"] in ("red", "blue") and rows[1]["label"] == ""
    assert f"2 of 3 images: 1 × not an image ({bad}), 1 × no such file" in capsys.readouterr().err


def test_classify_prints_an_aligned_table(saved, pairs, capsys):
    assert command("classify", saved, pairs / "0.png", "--labels", "red,blue") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "rank", "label", "probability"] and len(lines) == 2
    assert sum(float(line.split()[-1]) for line in lines) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "red,blue,red"), "given twice: red"),
        (("--labels", "red,,blue"), "empty"),
        (("--labels", "red,blue", "--templates", "none.txt"), "neither a file nor one of"),
        (("--labels", "red", "--top-k", "0"), "--top-k 0"),
        (("--labels-file", "missing.txt"), "no such file"),
    ],
)
def test_classify_ends_with_one_line_on_wrong_options(saved, pairs, capsys, options, message):
    assert command("classify", saved, pairs, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_classify_ends_with_one_line_when_no_image_can_be_read(saved, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert command("classify", saved, tmp_path / "a.png", "--labels", "red,blue") == 2
    error = capsys.readouterr().err
    assert "not an image" in error and error.count("\n") == 1


def test_a_probe_is_fitted_measured_saved_and_used(saved, labelled, tmp_path, capsys):
    file = tmp_path / "probe.safetensors"
    assert command("probe", "fit", saved, labelled, file, "--test", labelled, "--C", "0.1,10") == 0
    out = capsys.readouterr().out
    assert all(title in out for title in ("the model", "random tower", "pixels", "95 % interval", "chance"))
    assert command("probe", "predict", file, labelled, "--top-k", 1, "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    features = contrastive.embed(contrastive.load(saved), labelled, features="tower")
    assert [row["label"] for row in rows] == contrastive.LinearProbe.load(file).predict(features.image).tolist()
    assert np.mean([row["label"] == row["image"].split("/")[0] for row in rows]) > 0.9


def test_a_probe_remembers_features_and_inversion(saved, labelled, tmp_path, capsys):
    file = tmp_path / "probe.safetensors"
    command("probe", "fit", saved, labelled, file, "--C", 10, "--features", "projected", "--invert")
    capsys.readouterr()
    assert command("probe", "predict", file, labelled, "--format", "json", "--top-k", 1) == 0
    rows = json.loads(capsys.readouterr().out)
    found = contrastive.embed(contrastive.load(saved), labelled, invert=True)
    expected = contrastive.LinearProbe.load(file).predict_proba(found.image).max(axis=1)
    np.testing.assert_allclose([row["probability"] for row in rows], expected, rtol=1e-5)


def test_a_probe_refuses_another_model(saved, labelled, tmp_path, capsys):
    file = tmp_path / "probe.safetensors"
    command("probe", "fit", saved, labelled, file, "--C", 1)
    other = save_random_model(tmp_path / "other", 1)
    assert command("probe", "predict", file, labelled, "--model", other) == 2
    assert "belongs to the model" in capsys.readouterr().err


@pytest.mark.parametrize("left", [1, 0])
def test_a_probe_of_fewer_than_two_classes_is_told(saved, labelled, tmp_path, capsys, left):
    for name in NAMES[left:]:
        shutil.rmtree(labelled / name)
    assert command("probe", "fit", saved, labelled, tmp_path / "p.safetensors") == 2
    assert ("two classes" if left else "no images") in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()


def test_evaluate_prints_the_table_and_writes_json(saved, labelled, tmp_path, capsys):
    file = tmp_path / "results.json"
    options = ("--tasks", "zeroshot,probe", "--train", labelled, "--json", file)
    assert command("evaluate", saved, labelled, *options) == 0
    table = capsys.readouterr().out
    results = json.loads(file.read_text())["sets"]["labelled"]
    assert results["classes"] == 4 and set(results["probe"]) >= {"model", "random", "pixels"}
    assert f"{100 * results['probe']['random']['top1']['value']:.1f}%" in table and "chance" in table


def test_evaluate_retrieval_on_shards(saved, pairs, tmp_path, capsys):
    assert command("shard", pairs, tmp_path / "shards") == 0
    assert command("evaluate", saved, tmp_path / "shards", "--tasks", "retrieval") == 0
    assert "text to image, recall@10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "zeroshot,nearest"), "unknown: nearest"),
        (("--tasks", "probe"), "--train DATA"),
        (("--tasks", "fewshot,knn"), "fewshot,knn needs labelled training images"),
        (("--compare",), "two models"),
        (("--tasks", "fewshot", "--shots", "1,x", "--train", "none"), "--shots 1,x"),
        (("--labels", "red,green"), "blue, yellow"),
        (("--label", "colour"), "columns can be named for a table only"),
    ],
)
def test_evaluate_ends_with_one_line_on_wrong_options(saved, labelled, capsys, options, message):
    assert command("evaluate", saved, labelled, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_evaluate_on_a_table_without_labels_lists_its_columns(saved, pairs, tmp_path, capsys):
    table = tmp_path / "data.csv"
    table.write_text("file,caption,size\n" + f"{pairs / '0.png'},red square,12\n")
    assert command("evaluate", saved, table) == 2
    assert "columns found: file, caption, size" in capsys.readouterr().err


def evaluated(capsys, *arguments):
    assert command("evaluate", *arguments) == 0
    return capsys.readouterr().out


def test_evaluate_writes_results_predictions_and_a_page(saved, labelled, tmp_path, capsys):
    (labelled / "red" / "03.png").write_bytes(b"no image")
    out = tmp_path / "out"
    options = ("--tasks", "zeroshot,probe,fewshot,knn,retrieval", "--train", labelled, "--shots", "1,2")
    shown = evaluated(capsys, saved, labelled, *options, "--output", out, "--cache", tmp_path / "cache")
    assert sorted(path.name for path in out.iterdir()) == ["predictions.parquet", "report.html", "results.json"]
    assert "warning: labelled: 1 images could not be read" in shown
    results = json.loads((out / "results.json").read_text())
    found = results["sets"]["labelled"]
    assert found["failures"] == {"red/03.png": "not an image"} and found["shots"] == [1, 2]
    assert found["content"] == found["content_train"] and set(results["hashes"]) == {saved}
    assert results["versions"]["python"] and results["configuration"]["tasks"] == options[1]
    assert "red/03.png: not an image" in (out / "report.html").read_text()
    rows = pyarrow.parquet.read_table(out / "predictions.parquet").to_pylist()
    assert len(rows) == found["samples"] == 47
    right = np.mean([row["probe"] == row["label"] for row in rows])
    assert right == pytest.approx(found["probe"]["model"]["top1"]["value"])


def test_evaluate_reads_the_embeddings_of_embed(saved, labelled, tmp_path, capsys):
    assert command("embed", saved, labelled, tmp_path / "cache", "--captions", "none") == 0
    (folder,) = (tmp_path / "cache").iterdir()
    made = (folder / "image.npy").stat().st_mtime_ns
    evaluated(capsys, saved, labelled, "--cache", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [folder] and (folder / "image.npy").stat().st_mtime_ns == made


def test_evaluate_compares_two_models_on_the_same_images(saved, labelled, tmp_path, capsys):
    other = save_random_model(tmp_path / "other", 1)
    options = (labelled, "--tasks", "zeroshot,probe", "--train", labelled, "--compare", "--output", tmp_path / "out")
    shown = evaluated(capsys, saved, other, *options)
    assert "McNemar" in shown and "zeroshot/top1" in shown and "bootstrap" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measures = results["comparison"]["labelled"]["measures"]
    for name, sets in (("a", "sets"), ("b", "sets_b")):
        assert measures["zeroshot/top1"][name] == results[sets]["labelled"]["zeroshot"]["top1"]["value"]
    assert "two models" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_ends_with_one_line_when_too_many_images_are_unreadable(saved, labelled, capsys):
    for number in range(6):
        (labelled / "red" / f"{number:02d}.png").write_bytes(b"no image")
    assert command("evaluate", saved, labelled) == 2
    error = capsys.readouterr().err
    assert "6 of 48 images cannot be read (6 × not an image; first red/00.png)" in error and error.count("\n") == 1
    assert command("evaluate", saved, labelled, "--max-unreadable", 0.2) == 0


def test_evaluate_ends_with_one_line_when_a_class_has_fewer_images_than_shots(saved, labelled, capsys):
    options = ("--tasks", "fewshot", "--train", labelled, "--shots", "1,13")
    assert command("evaluate", saved, labelled, *options) == 2
    error = capsys.readouterr().err
    assert "shots: 13 asked for, but blue has 12 training images" in error and error.count("\n") == 1
