"""Folders of images: every file is read, is a caption, or is counted; names and classes are what a user means."""

import json
import random
from pathlib import Path

import pytest

from contrastive.errors import UserError
from contrastive.evaluation.remarks import source_remarks
from contrastive.shards import open_index, open_source
from contrastive.shards.left_out import left_out_line
from contrastive.shards.listing import list_folder

from .small import CLASSIFY, DATA, picture, write_files, write_tar


def copied(name: str, tmp_path: Path) -> Path:
    """A case without its README, which is no part of the data."""
    files = {p.name: p.read_bytes() for p in (DATA / name).iterdir() if p.name != "README"}
    return write_files(tmp_path / name, files)


def test_pictures_of_modern_formats_are_read_whatever_their_name(tmp_path: Path) -> None:
    source = open_source(copied("folder_with_modern_formats", tmp_path))
    found = {record.key: record for record in source}
    assert len(found) == 10 and not source.rejected
    assert {"m1.avif", "IMG_2002.HEIC", "m3.jxl", "m4.jfif", "m5.JPE", "m6"} < found.keys()
    assert all(record.captions for record in found.values())


@pytest.mark.parametrize("name", ["a.jpeg2", "a.JPG_large", "photo", "a.b.c", "a.dat"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_content_decides_where_the_extension_is_unknown(tmp_path: Path, name: str, format: str) -> None:
    write_files(tmp_path, {name: picture(1, format), "b.jpg": picture(2)})
    assert sorted(record.key for record in open_source(tmp_path)) == sorted([name, "b.jpg"])


def test_files_that_are_no_pictures_are_counted_by_extension(tmp_path: Path) -> None:
    draw = random.Random(0)
    extensions = {"pdf": 2, "MP4": 3, "psd": 1, "svg": 1, "json": 2, "": 2}
    files = {f"ok{i}.jpg": picture(i) for i in range(2)}
    for extension, count in extensions.items():
        for i in range(count):
            files[f"{draw.choice('xyz')}/{i}{extension and '.'}{extension}"] = draw.randbytes(40)
    source = open_source(write_files(tmp_path, files))
    counts = {".pdf": 2, ".mp4": 3, ".psd": 1, ".svg": 1, ".json": 2, "no extension": 2}
    assert source.rejected == counts
    assert left_out_line(source.rejected).startswith("left out: 3 × .mp4, 2 × .json, 2 × .pdf")


@pytest.mark.parametrize("extension", ["dng", "NEF", "cr2", "arw"])
def test_the_preview_in_a_raw_file_is_not_taken_for_the_photograph(tmp_path: Path, extension: str) -> None:
    source = open_source(write_files(tmp_path, {f"a.{extension}": picture(0, "TIFF"), "b.jpg": picture(1)}))
    assert [record.key for record in source] == ["b.jpg"]
    assert source.rejected == {f".{extension.lower()} (camera raw)": 1}


@pytest.mark.parametrize("name", ["a.jpg_original", "a.jpg.bak", "a.jpg.crdownload", "a.jpg~"])
def test_copies_and_unfinished_downloads_are_counted_and_not_read(tmp_path: Path, name: str) -> None:
    source = open_source(write_files(tmp_path, {name: picture(0), "a.jpg": picture(0), "a.txt": b"a"}))
    assert [(record.key, record.fault) for record in source] == [("a.jpg", None)]
    assert sum(source.rejected.values()) == 1


def test_a_table_beside_pictures_is_counted_with_a_remedy(tmp_path: Path) -> None:
    source = open_source(write_files(tmp_path, {"pairs.csv": b"image,caption\na.jpg,a\n", "a.jpg": picture()}))
    assert source.rejected == {".csv (a table: give it by name)": 1}


def test_nothing_below_a_hidden_folder_is_read_or_a_class() -> None:
    source = open_source(CLASSIFY / "hidden" / "train")
    assert len(source) == 16 and {record.label for record in source} == {"cat", "coffee"}
    assert source.rejected == {}
    assert source.notes == ["hidden: 3 images of a file or folder whose name begins with a dot"]


@pytest.mark.parametrize(
    ("hidden", "counted"),
    [
        (".git/x.png", 0),
        (".thumbnails/cat/1.png", 1),
        ("__MACOSX/cat/._1.png", 0),
        ("cat/._1.png", 0),
        ("cat/.1.png", 1),
        ("@eaDir/1.png", 0),
        ("cat/Thumbs.db", 0),
        ("desktop.ini", 0),
    ],
)
def test_what_systems_leave_is_hidden(tmp_path: Path, hidden: str, counted: int) -> None:
    write_files(tmp_path, {"cat/1.png": picture(1), "dog/1.png": picture(2), hidden: picture(3)})
    listing = list_folder(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in listing.images] == ["cat/1.png", "dog/1.png"]
    assert (listing.others, listing.hidden) == ([], counted)
    source = open_source(tmp_path)
    assert [record.label for record in source] == ["cat", "dog"] and not source.rejected


def test_a_hard_wrapped_caption_is_one_caption_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    folder = copied("sidecar_wrapped", tmp_path)
    source = open_source(folder)
    texts = {p.stem: p.read_text().strip() for p in folder.glob("*.txt")}
    assert {r.key.removesuffix(".jpg"): r.captions for r in source} == {key: (text,) for key, text in texts.items()}
    write_tar(tmp_path / "x.tar", [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())])
    index = open_index(tmp_path / "x.tar")
    assert {index.key(i): (index.caption(i),) for i in range(len(index))} == {
        key: (text,) for key, text in texts.items()
    }
    assert (
        "6 of 6 .txt files have several lines: each file is one caption (several go into metadata.jsonl)"
        in source.notes
    )


@pytest.mark.parametrize("text", ["one\ntwo", "\ufeffone", "  one \r\n two\n\n", "one\n\n\ntwo\tthree\n"])
def test_a_caption_file_gives_the_same_caption_in_a_folder_and_in_a_tar(tmp_path: Path, text: str) -> None:
    files = {"a.jpg": picture(), "a.txt": text.encode()}
    (record,) = open_source(write_files(tmp_path / "folder", files))
    (other,) = open_source(write_tar(tmp_path / "x.tar", files.items()))
    assert record.captions == other.captions == (text.removeprefix("\ufeff").strip(),)


def test_a_caption_that_is_not_utf8_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    folder = copied("txt_cp1252", tmp_path)
    records = list(open_source(folder))
    assert [(r.key, r.fault) for r in records if r.fault] == [("3.jpg", "caption not UTF-8")]
    assert sum(bool(r.captions) for r in records) == 5


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "shift-jis"])
def test_captions_of_other_encodings_are_counted_alike_in_a_folder_and_a_tar(tmp_path: Path, encoding: str) -> None:
    text = "ねこ" if encoding == "shift-jis" else "Müsli"
    files = {"a.jpg": picture(1), "a.txt": text.encode(encoding), "b.jpg": picture(2), "b.txt": b"plain"}
    faults = [record.fault for record in open_source(write_files(tmp_path / "folder", files))]
    tar = open_source(write_tar(tmp_path / "x.tar", files.items()))
    assert faults == ["caption not UTF-8", None]
    assert tar.rejected == {"caption not UTF-8": 1} and len(tar) == 1


@pytest.mark.parametrize(
    ("image", "text"),
    [("IMG_1.JPG", "IMG_1.TXT"), ("IMG_1.JPG", "img_1.txt"), ("a.b.jpg", "a.b.Txt"), ("m6", "m6.txt")],
)
def test_names_of_captions_are_compared_without_regard_to_case(tmp_path: Path, image: str, text: str) -> None:
    write_files(tmp_path, {image: picture(), text: b"found"})
    (record,) = open_source(tmp_path)
    assert record.captions == ("found",)


def test_a_name_that_is_exactly_the_same_goes_first(tmp_path: Path) -> None:
    files = {
        "A.jpg": picture(1),
        "a.jpg": picture(2),
        "a.txt": b"small",
        "B.png": picture(3),
        "b.txt": b"b",
        "B.txt": b"B",
    }
    found = {record.key: record.captions for record in open_source(write_files(tmp_path, files))}
    assert found == {"A.jpg": (), "a.jpg": ("small",), "B.png": ("B",)}


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.jpg", "a.JPG"), ("a.jpeg", "a.webp", "a.png")])
def test_several_images_of_one_caption_are_named_and_none_is_taken(tmp_path: Path, names: tuple[str, ...]) -> None:
    files = {name: picture(i, "PNG") for i, name in enumerate(names)} | {
        "a.txt": b"which",
        "b.jpg": picture(9),
        "b.txt": b"b",
    }
    records = {record.key: record for record in open_source(write_files(tmp_path, files))}
    assert records["b.jpg"].fault is None
    for name in names:
        assert (records[name].fault, records[name].captions) == ("caption of several images", ())
        assert records[name].image and all(other in str(records[name].detail) for other in (*names, "a.txt"))
    tar = open_source(write_tar(tmp_path / "x.tar", [(name, data) for name, data in files.items() if name != "a.JPG"]))
    if "a.JPG" not in names:
        assert tar.rejected == {"caption of several images": 1}


def test_images_without_a_caption_beside_others_are_told_and_texts_without_an_image_counted(tmp_path: Path) -> None:
    files = {f"{i}.jpg": picture(i) for i in range(5)} | {
        "0.txt": b"a",
        "1.txt": b"b",
        "notes.txt": b"x",
        "9.txt": b"y",
    }
    source = open_source(write_files(tmp_path, files))
    assert source.notes == ["3 of 5 images have no caption: no .txt file of the same name"]
    assert source.rejected == {".txt without an image": 2}


def test_a_command_that_reads_images_only_says_nothing_of_captions(tmp_path: Path) -> None:
    files = {"0.jpg": picture(0), "1.jpg": picture(1), "0.txt": b"a\nb", "notes.txt": b"x", "a.psd": b"y"}
    source = open_source(write_files(tmp_path, files))
    assert source_remarks(source, captions=False) == ["left out: 1 × .psd"]
    assert [line.partition(":")[0] for line in source_remarks(source)] == [
        "1 of 2 images have no caption",
        "1 of 1 .txt file has several lines",
        "left out",
    ]


def test_images_beside_class_folders_and_empty_class_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "bird").mkdir()
    source = open_source(
        write_files(tmp_path, {"cat/1.png": picture(1), "dog/a/2.png": picture(2), "3.png": picture(3)})
    )
    assert {record.key: record.label for record in source} == {"3.png": None, "cat/1.png": "cat", "dog/a/2.png": "dog"}
    assert source.notes == [
        "no image in the class folders: bird",
        "1 image is outside the class folders and has no label: 3.png",
    ]


def test_a_folder_around_all_class_folders_is_no_class(tmp_path: Path) -> None:
    source = open_source(write_files(tmp_path, {"train/cat/1.png": picture(1), "train/dog/2.png": picture(2)}))
    assert [record.label for record in source] == ["cat", "dog"]
    assert source.notes == ["classes are the folders in train/"]


@pytest.mark.parametrize("names", [["a", "b"], ["1", "10", "2"]])
def test_class_folders_keep_their_names(tmp_path: Path, names: list[str]) -> None:
    write_files(tmp_path, {f"{name}/x.png": picture(i) for i, name in enumerate(names)})
    assert [record.label for record in open_source(tmp_path)] == names


def test_a_glob_of_everything_reads_pictures_with_their_captions(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": picture(1), "a.txt": b"one", "b": picture(2), "c.pdf": b"%PDF"})
    source = open_source(f"{tmp_path}/*")
    assert {record.key: record.captions for record in source} == {"a.jpg": ("one",), "b": ()}
    assert source.rejected == {".pdf": 1}


def test_a_file_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"c.pdf": b"%PDF", "d.txt": b"text"})
    for name in ("c.pdf", "d.txt"):
        with pytest.raises(UserError, match=f"{name}: unknown kind of file"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.zst", "x.tar.bz2", "x.tar.xz", "x.TAR.GZ"])
def test_a_compressed_tar_is_an_error_with_the_command_that_unpacks_it(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {name: b"\x1f\x8b"})
    for path in (tmp_path, tmp_path / name, f"{tmp_path}/x*"):
        for opened in (open_source, open_index):
            with pytest.raises(
                UserError, match=r"compressed tar; .* unpack first: (gunzip|zstd -d|bunzip2|unxz) "
            ) as error:
                opened(path)
            assert str(error.value).endswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_the_compressed_tar_of_the_case_is_named() -> None:
    with pytest.raises(UserError, match=r"00000\.tar\.gz: a compressed tar; .*unpack first: gunzip .*00000\.tar\.gz"):
        open_source(DATA / "tar_gz")


def test_json_beside_images_gives_captions_as_in_tars(tmp_path: Path) -> None:
    info = {"caption": "a cat", "url": "u", "status": "success"}
    files = {"a.jpg": picture(1), "a.json": json.dumps(info).encode()}
    files |= {"b.jpg": picture(2), "b.json": json.dumps({"captions": ["one", "two"]}).encode()}
    files |= {"c.jpg": picture(3), "c.txt": b"text", "c.json": json.dumps({"captions": ["text", "more"]}).encode()}
    files |= {"d.jpg": picture(4), "d.json": b"{", "e.json": b"{}"}
    source = open_source(write_files(tmp_path / "d", files))
    found = {record.key: (record.captions, record.fault) for record in source}
    assert found == {
        "a.jpg": (("a cat",), None),
        "b.jpg": (("one", "two"), None),
        "c.jpg": (("text", "more"), None),
        "d.jpg": ((), "not JSON"),
    }
    assert source.rejected == {".json": 1}
    index = open_index(write_tar(tmp_path / "x.tar", list(files.items())))
    in_tar = {f"{index.key(i)}.jpg": (index.record(i).captions, None) for i in range(len(index))}
    assert in_tar == {key: value for key, value in found.items() if value[1] is None}


def test_json_without_captions_leaves_the_class_folders(tmp_path: Path) -> None:
    files = {f"{label}/{i}.{kind}": b"{}" for label in ("cat", "dog") for i in range(2) for kind in ("json",)}
    files |= {f"{label}/{i}.jpg": picture(i) for label in ("cat", "dog") for i in range(2)}
    source = open_source(write_files(tmp_path, files))
    assert {record.label for record in source} == {"cat", "dog"} and source.rejected == {".json": 4}
