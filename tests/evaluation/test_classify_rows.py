"""Rows and messages of `classify`, `probe` and `evaluate`: paths as typed, input order, one line for each mistake."""

import base64
import csv
import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from contrastive.printable import printable
from tests.evaluation.fake import NAMES, square
from tests.evaluation.test_commands import command, save_random_model

LABELS = ("--labels", "red,blue", "--top-k", "1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with 16 images, eight in each of two folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            square(NAMES[number % 4], number).save(tmp_path / name / f"{number}.png")
    return tmp_path


def rows_of(capsys):
    return json.loads(capsys.readouterr().out)


def classify(saved, *arguments):
    return command("classify", saved, *arguments, *LABELS, "--format", "json")


def refused(capsys, code):
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 400
    return error


# ---- keys and order


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a/0.png"], ["a/0.png"]),
        (["a/3.png", "b/1.png", "a/0.png"], ["a/3.png", "b/1.png", "a/0.png"]),
        (["a/[01].png"], ["a/0.png", "a/1.png"]),
        (["./a/0.png", "b/*[67].png"], ["./a/0.png", "b/6.png", "b/7.png"]),
        (["b", "a"], [f"{folder}/{number}.png" for folder in "ba" for number in range(8)]),
        (["b", "a/5.png"], [*(f"b/{number}.png" for number in range(8)), "a/5.png"]),
        (["a"], [f"{number}.png" for number in range(8)]),
    ],
    ids=str,
)
def test_images_are_called_what_was_typed(saved, here, capsys, arguments, expected):
    assert classify(saved, *arguments) == 0
    assert [row["image"] for row in rows_of(capsys)] == expected


def test_rows_of_a_table_are_called_by_path_or_key_or_place(saved, here, capsys):
    (here / "t.csv").write_text("image,caption\na/0.png,x\nb/1.png,y\n")
    (here / "k.csv").write_text("key,image,caption\none,a/0.png,x\ntwo,b/1.png,y\n")
    png = io.BytesIO()
    square("red").save(png, "PNG")
    pyarrow.parquet.write_table(pa.table({"image": [png.getvalue()] * 2, "caption": ["x", "y"]}), here / "t.parquet")
    names = []
    for table in ("t.csv", "k.csv", "t.parquet"):
        assert classify(saved, table) == 0
        names.append([row["image"] for row in rows_of(capsys)])
    assert names[:2] == [["a/0.png", "b/1.png"], ["one", "two"]]
    assert names[2] == ["t.parquet: row 1", "t.parquet: row 2"] or all("t.parquet" in name for name in names[2])


@pytest.mark.parametrize("broken", [[0], [7], [0, 1, 2], [1, 3, 6]])
@pytest.mark.parametrize("kind", ["folder", "files", "table"])
def test_failures_stand_where_they_stand_in_the_input(saved, here, capsys, broken, kind):
    for number in broken:
        (here / "a" / f"{number}.png").write_bytes(b"no image")
    files = [f"a/{number}.png" for number in range(8)]
    (here / "t.csv").write_text("image,caption\n" + "".join(f"{file},x\n" for file in files))
    assert classify(saved, *{"folder": ["a"], "files": files, "table": ["t.csv"]}[kind]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["image"].removeprefix("a/") for row in rows] == [f"{number}.png" for number in range(8)]
    assert [number for number, row in enumerate(rows) if row["error"]] == broken
    assert all((row["label"] is None) == bool(row["error"]) for row in rows)
    assert f"not read: {len(broken)} of 8 images: {len(broken)} × not an image" in err


def test_the_same_file_twice_has_two_rows(saved, here, capsys):
    (here / "bad.png").write_bytes(b"no image")
    assert classify(saved, "a/0.png", "bad.png", "a/0.png", "bad.png") == 0
    assert [row["image"] for row in rows_of(capsys)] == ["a/0.png", "bad.png", "a/0.png", "bad.png"]


def test_none_of_these_and_several_labels_keep_the_order(saved, here, labelled, capsys):
    (here / "a" / "2.png").write_bytes(b"no image")
    options = ("--labels", ",".join(NAMES), "--validation", labelled, "--format", "json", "--top-k", "1")
    for extra in ("--reject", "--multilabel"):
        assert command("classify", saved, "a", *options, extra) == 0
        names = [row["image"] for row in rows_of(capsys)]
        assert list(dict.fromkeys(names)) == [f"{number}.png" for number in range(8)]


def test_a_probe_predicts_in_the_same_order(saved, here, labelled, capsys):
    assert command("probe", "fit", saved, labelled, "p.safetensors", "--C", 1) == 0
    (here / "a" / "2.png").write_bytes(b"no image")
    capsys.readouterr()
    assert command("probe", "predict", "p.safetensors", "b", "a", "--top-k", 1, "--format", "json") == 0
    rows = rows_of(capsys)
    assert [row["image"] for row in rows] == [f"{folder}/{number}.png" for folder in "ba" for number in range(8)]
    assert [row["image"] for row in rows if row["error"]] == ["a/2.png"]


def test_images_none_of_which_can_be_read_end_with_code_2(saved, here, capsys):
    for number in range(8):
        (here / "a" / f"{number}.png").write_bytes(b"no image")
    assert "none of the 8 images can be read" in refused(capsys, classify(saved, "a"))


# ---- names that are not UTF-8


@pytest.mark.parametrize("style", ["table", "csv", "json"])
@pytest.mark.parametrize("to_file", [True, False])
def test_a_name_that_is_not_utf8_ends_no_run(saved, here, capsys, style, to_file):
    odd = os.fsencode(here / "a") + b"/caf\xe9.png"
    shutil.copy(here / "a" / "0.png", odd)
    (here / "a" / "line\nbreak.png").write_bytes((here / "a" / "1.png").read_bytes())
    output = ("--output", "out") if to_file else ()
    assert command("classify", saved, "a", *LABELS, "--format", style, *output) == 0
    text = (here / "out").read_text(encoding="utf-8") if to_file else capsys.readouterr().out
    if style == "json":
        names = [row["image"] for row in json.loads(text)]
    elif style == "csv":
        names = [row["image"] for row in csv.DictReader(io.StringIO(text))]
    else:
        names = text.splitlines()[1:]
    assert len(names) == 10 and sum("caf\\xe9.png" in name for name in names) == 1


def test_names_stay_apart_when_escaped():
    given = [os.fsdecode(name) for name in (b"a\xff", b"a\\xff", b"a\\\\xff", b"a\xc3\xbf", b"a\\b", b"a\xfe", b"a")]
    shown = [printable(name) for name in given]
    assert len(set(shown)) == len(given)
    assert shown[0] == "a\\xff" and shown[3] == "aÿ" and shown[4] == "a\\b"
    for one in shown:
        one.encode()


def test_an_evaluation_of_names_that_are_not_utf8_is_written(saved, here, labelled):
    for name in NAMES:
        shutil.copy(labelled / name / "00.png", os.fsencode(labelled / name) + b"/caf\xe9.png")
    os.rename(labelled / "red", os.fsencode(labelled) + b"/r\xe9d")
    assert command("evaluate", saved, labelled, "--output", "out", "--train", labelled, "--tasks", "zeroshot,knn") == 0
    results = json.loads((here / "out" / "results.json").read_text(encoding="utf-8"))
    assert "r\\xe9d" in results["sets"]["labelled"]["zeroshot"]["names"]
    keys = pyarrow.parquet.read_table(here / "out" / "predictions.parquet")["key"].to_pylist()
    assert "blue/caf\\xe9.png" in keys


def test_embeddings_of_names_that_are_not_utf8_are_kept(saved, here, capsys):
    shutil.copy(here / "a" / "0.png", os.fsencode(here / "a") + b"/caf\xe9.png")
    for _ in range(2):
        assert command("embed", saved, "a", "kept") == 0
    assert "9 images" in capsys.readouterr().out


# ---- what the images are not


def test_what_is_no_image_gets_a_short_line(saved, here, capsys):
    uri = "data:image/png;base64," + base64.b64encode((here / "a" / "0.png").read_bytes() * 50).decode()
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("a/0.png\n")
    for argument, message in {
        uri: "a data URI (image/png",
        base64.b64encode(b"x" * 600).decode(): "no file has so long a name",
        "https://example.org/cat.jpg?size=" + "9" * 300: "a URL, which is not read; download it",
        "s3://bucket/cat.jpg": "a URL",
        "-": "standard input is not read",
        saved: "a model folder",
        "notes.txt": "a .txt file, no image",
        "a/*.webp": "the pattern matches no file",
        "empty": "empty",
        "missing.png": "no such file",
    }.items():
        assert message in refused(capsys, classify(saved, argument)), argument
    for argument in ("-", "https://example.org/cat.jpg", "empty"):
        refused(capsys, classify(saved, "a/0.png", argument))


def test_model_and_images_that_were_exchanged_are_named(saved, here, capsys):
    for given in (("a/0.png", saved), ("a", saved)):
        assert "the order is MODEL IMAGES" in refused(capsys, command("classify", *given, *LABELS))
    assert "the order is MODEL" in refused(capsys, command("evaluate", "a", saved))
    assert "the order is MODEL" in refused(capsys, command("embed", "a", saved, "kept"))


def test_tables_among_several_arguments_are_refused(saved, here, capsys):
    (here / "t").mkdir()
    (here / "t" / "t.csv").write_text("image,caption\n../a/0.png,x\n")
    assert "one at a time" in refused(capsys, classify(saved, "a", "t"))


# ---- outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "none/out.csv"), "there is no folder none; make it first"),
        (("--output", "a"), "is a folder"),
        (("--output", "a/0.png/out.csv"), "a file, not a folder"),
        (("--save", "a"), "is a folder"),
        (("--save", "a/0.png/c.safetensors"), "a file, not a folder"),
    ],
)
def test_an_output_that_cannot_be_is_named_before_the_model_is_opened(here, capsys, options, message, monkeypatch):
    monkeypatch.setattr("contrastive.models.load", lambda *_, **__: pytest.fail("the model was opened"))
    assert message in refused(capsys, command("classify", "model", "b", *LABELS, *options))
    if options[0] == "--save":
        assert message in refused(capsys, command("probe", "fit", "model", "b", options[1]))
    else:
        assert message in refused(capsys, command("evaluate", "model", "b", "--json", options[1]))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_named_before(here, capsys):
    (here / "a").chmod(0o500)
    assert "no permission" in refused(capsys, command("classify", "model", "b", *LABELS, "--output", "a/out"))


def test_folders_for_results_are_checked_before(here, capsys, monkeypatch):
    monkeypatch.setattr("contrastive.models.load", lambda *_, **__: pytest.fail("the model was opened"))
    assert "a file" in refused(capsys, command("evaluate", "model", "b", "--output", "a/0.png"))
    assert "a file" in refused(capsys, command("embed", "model", "b", "a/0.png/kept"))


# ---- labels, names and splits


@pytest.mark.parametrize(("labels", "message"), [("red", "is the only one"), ("red,Red ,red", "given twice: red")])
def test_labels_that_cannot_be_compared_are_refused_before_the_model(here, capsys, monkeypatch, labels, message):
    monkeypatch.setattr("contrastive.models.load", lambda *_, **__: pytest.fail("the model was opened"))
    assert message in refused(capsys, command("classify", "model", "a", "--labels", labels))


def test_one_label_goes_with_a_threshold(saved, here, labelled, capsys):
    shutil.copytree(labelled / "red", here / "one" / "red")
    options = ("--labels", "red", "--validation", "one", "--unknown", "b", "--reject", "--format", "json")
    assert command("classify", saved, "a", *options) == 0
    rows = rows_of(capsys)
    assert len(rows) == 8 and {row["label"] for row in rows} <= {"red", "none of these"}
    assert all(row["probability"] is None for row in rows)


def test_labels_equal_but_for_case_get_a_warning(saved, here, capsys):
    assert command("classify", saved, "a", "--labels", "red,Red") == 0
    assert "warning: labels 'red' and 'Red' differ in spelling alone" in capsys.readouterr().err


@pytest.fixture
def numbered(here, labelled):
    """The classes as folders 1, 2, 10, 11, and a file with their names."""
    for number, name in zip((1, 2, 10, 11), NAMES, strict=True):
        shutil.copytree(labelled / name, here / "numbered" / str(number))
    (here / "names.json").write_text(json.dumps({"1": "red", "2": "green", "10": "blue", "11": "yellow"}))
    return "numbered"


def test_folders_named_by_numbers_are_warned_of_and_named(saved, numbered, here, capsys):
    assert command("evaluate", saved, numbered) == 0
    assert "labels are numbers (1, 2, 10, …), which say nothing to a text tower" in capsys.readouterr().out
    options = ("--class-names", "names.json", "--output", "out", "--train", numbered, "--tasks", "zeroshot,probe")
    assert command("evaluate", saved, numbered, *options) == 0
    assert "labels are numbers" not in capsys.readouterr().out
    results = json.loads((here / "out" / "results.json").read_text())["sets"]["numbered"]
    assert sorted(results["zeroshot"]["names"]) == sorted(results["probe"]["names"]) == sorted(NAMES)
    assert command("probe", "fit", saved, numbered, "p.safetensors", "--C", 1, "--class-names", "names.json") == 0
    capsys.readouterr()
    assert command("probe", "predict", "p.safetensors", "a", "--top-k", 1, "--format", "json") == 0
    assert {row["label"] for row in rows_of(capsys)} <= set(NAMES)
    options = ("--labels", ",".join(NAMES), "--validation", numbered, "--class-names", "names.json")
    assert command("classify", saved, "a", *options) == 0
    assert "calibration error" in capsys.readouterr().err


def test_a_class_without_a_name_is_named(saved, numbered, here, capsys):
    (here / "few.json").write_text('{"1": "red"}')
    for arguments in (("evaluate", saved, numbered), ("probe", "fit", saved, numbered, "p.safetensors")):
        assert "no name for 2, 10, 11" in refused(capsys, command(*arguments, "--class-names", "few.json"))


def test_a_balanced_probe_is_fitted_and_remembered(saved, labelled, tmp_path, capsys):
    from contrastive.evaluation import LinearProbe

    for number in range(8):
        (labelled / "red" / f"{number:02d}.png").unlink()
    file = tmp_path / "p.safetensors"
    assert command("probe", "fit", saved, labelled, file, "--C", 1, "--class-weight", "balanced") == 0
    probe = LinearProbe.load(file)
    assert probe.class_weight == probe.metadata_["results"]["class_weight"] == "balanced"


@pytest.fixture
def hub(here, labelled):
    """A Hugging Face repository on disk: Parquet files of two splits."""
    (here / "hub").mkdir()
    for split, shift in (("train", 0), ("test", 6)):
        images, labels = [], []
        for name in NAMES:
            for shade in range(shift, shift + 6):
                images.append({"bytes": (labelled / name / f"{shade:02d}.png").read_bytes(), "path": None})
                labels.append(name)
        table = pa.table({"image": images, "label": labels})
        pyarrow.parquet.write_table(table, here / "hub" / f"{split}-00000-of-00001.parquet")
    return "hub"


def test_splits_are_asked_for_and_taken(saved, hub, here, capsys):
    assert "--split" in refused(capsys, command("evaluate", saved, hub))
    asked = refused(capsys, command("evaluate", saved, hub, "--split", "test", "--train", hub, "--tasks", "knn"))
    assert "--train-split" in asked
    options = ("--split", "test", "--train", hub, "--train-split", "train", "--tasks", "zeroshot,probe,knn")
    assert command("evaluate", saved, hub, *options, "--json", "r.json") == 0
    (results,) = json.loads((here / "r.json").read_text())["sets"].values()
    assert results["samples"] == 24 and results["probe"]["train_size"] == 24
    options = ("--split", "train", "--test", hub, "--test-split", "test", "--C", "1")
    assert command("probe", "fit", saved, hub, "p.safetensors", *options) == 0
    assert "24 training images, 4 classes; 24 test images" in capsys.readouterr().out
    assert "--split" in refused(capsys, classify(saved, hub))
    options = ("--split", "test", "--labels", ",".join(NAMES), "--validation", hub, "--validation-split", "train")
    assert command("classify", saved, hub, *options) == 0
    assert command("embed", saved, hub, "kept", "--split", "train") == 0
    assert "24 images" in capsys.readouterr().out


def test_a_row_without_a_label_is_named(saved, here, capsys):
    (here / "t.csv").write_text("image,label\na/0.png,red\na/1.png,\na/2.png,blue\n")
    error = refused(capsys, command("evaluate", saved, "t.csv"))
    assert "1 image has no label" in error or "no label" in error
    (here / "s.csv").write_text("image,label\na/0.png,red \na/1.png, red\na/2.png,blue\na/3.png,blue\n")
    assert command("evaluate", saved, "s.csv", "--json", "r.json") == 0
    assert json.loads((here / "r.json").read_text())["sets"]["s"]["classes"] == 2


def test_predictions_of_a_run_are_the_same_in_every_format(saved, here, capsys):
    assert classify(saved, "a") == 0
    expected = [(row["image"], row["label"]) for row in rows_of(capsys)]
    assert command("classify", saved, "a", *LABELS, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["image"], row["label"]) for row in rows] == expected
    assert np.isfinite([float(row["probability"]) for row in rows]).all()


# ---- tables


def table_of(here, kind, rows):
    """A table of images in folder a."""
    file = here / f"x.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(",".join(map(str, line)) for line in [list(rows[0]), *(r.values() for r in rows)]))
    return file


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_row_of_a_table_is_classified_also_where_an_image_comes_again(saved, here, capsys, kind):
    rows = [{"image": f"a/{n}.png", "caption": f"words {i}", "label": i} for i, n in enumerate((0, 1, 0, 0))]
    assert classify(saved, table_of(here, kind, rows)) == 0
    assert [row["label"] is not None for row in rows_of(capsys)] == [True] * 4


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_with_fractions_are_refused_with_their_column(saved, here, capsys, kind):
    rows = [{"image": f"a/{n}.png", "label": n % 2 + 0.5} for n in range(8)]
    error = refused(capsys, command("probe", "fit", saved, table_of(here, kind, rows), "p.safetensors"))
    assert "column 'label' holds numbers with fractions, such as 0.5" in error


@pytest.mark.parametrize("missing", [0, 3])
def test_a_row_without_a_label_is_named_by_its_place_and_path(saved, here, capsys, missing):
    rows = [{"image": f"a/{n}.png", "label": "" if n == missing else "red"} for n in range(8)]
    file = table_of(here, "csv", rows)
    for arguments in (("probe", "fit", saved, file, "p.safetensors"), ("evaluate", saved, file)):
        error = refused(capsys, command(*arguments))
        assert f"x.csv: line {missing + 2} (a/{missing}.png)" in error and "column 'label'" in error


def test_a_picture_beside_the_class_folders_is_to_be_moved(saved, here, capsys):
    square("red", 0).save(here / "b" / "z.png")
    for name in ("c", "d"):
        shutil.copytree(here / "a", here / "b" / name)
    for stray in (here / "b").glob("[0-9].png"):
        stray.unlink()
    error = refused(capsys, command("probe", "fit", saved, here / "b", "p.safetensors"))
    assert "z.png" in error and "move it into a class folder, or remove it" in error
