"""Sets that are one JSON file and a folder of images: COCO's captions, and Karpathy's splits of COCO and Flickr."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from contrastive.errors import UserError
from contrastive.shards.record import NumberedSource, Record
from contrastive.shards.splits import several_splits, wanted_splits
from contrastive.shards.table_images import ImageReader
from contrastive.wording import one_line

LAYOUTS = (
    'COCO\'s captions ({"images": [...], "annotations": [{"image_id", "caption"}]}) and Karpathy\'s splits '
    '({"images": [{"filename", "split", "sentences"}]})'
)
TRIED = 10  # first images that are looked for in each folder


class Entry(NamedTuple):
    """An image by its path in the folder of images, and its captions."""

    path: str
    captions: tuple[str, ...]


class JsonSet(NumberedSource):
    """One record an image, with all its captions; the key is the image's path in the folder of images.

    Args:
        file: the JSON file.
        images: the folder of images; None to look for it next to the file.
        split: of Karpathy's splits, the one to read, or several that "+" joins.

    Raises UserError: another layout, several splits and none chosen, no image where they should lie.
    """

    kind = "json"
    allow_outside = True

    def __init__(self, file: Path, images: str | None = None, split: str | None = None) -> None:
        self.files, self.columns, self.split = [file], [], split
        value = _read(file)
        self._notes: list[str] = []
        self._reader: ImageReader | None = None
        left: Counter[str] = Counter()
        if any(isinstance(one, dict) and "sentences" in one for one in _listed(value, "images")):
            self.entries = list(_karpathy(file, value, split, self._notes, left))
        elif split is not None:
            raise UserError(f"--split {split}: {file} holds no splits; leave it out")
        else:
            self.entries = list(_coco(file, value, left))
        if not self.entries:
            raise UserError(f"{file}: lists no images")
        self.left_out = +left
        self.folder = _images_folder(file, images, [entry.path for entry in self.entries[:TRIED]])

    @property
    def notes(self) -> list[str]:
        return self._notes

    def identity(self) -> dict[str, Any]:
        more = {"folder": os.path.abspath(self.folder), "split": self.split, "allow_outside": self.allow_outside}
        return {**super().identity(), **more}

    def _record(self, i: int) -> Record:
        entry = self.entries[i]
        if self._reader is None or self._reader.allow_outside != self.allow_outside:
            self._reader = ImageReader(self.folder, self.allow_outside, "the folder of images")
        image, fault, detail = self._reader.read(entry.path)
        return Record(entry.path, image, entry.captions, fault=fault, detail=detail)

    def _count(self) -> int:
        return len(self.entries)


def captions_files(folder: Path) -> list[Path]:
    """The .json files below a folder, of a few, that hold captions in a known layout."""
    return [file for file in islice(sorted(folder.rglob("*.json")), TRIED) if _holds_captions(file)]


def _holds_captions(file: Path) -> bool:
    try:
        value = _read(file)
    except (UserError, OSError):
        return False
    return any("sentences" in one for one in _listed(value, "images")) or any(
        "caption" in note for note in _listed(value, "annotations")
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as fault:
        raise UserError(
            f"{file}: not one JSON value ({one_line(fault)}); if it holds one object a line, name it .jsonl"
        ) from None
    if isinstance(value, list):
        raise UserError(
            f"{file}: a JSON list is not read; write its objects one a line to a .jsonl file: "
            f"jq -c '.[]' {file.name} > {file.stem}.jsonl"
        )
    if not isinstance(value, dict) or not _listed(value, "images"):
        raise UserError(f"{file}: an unknown layout; of .json files {LAYOUTS} are read")
    return value


def _coco(file: Path, value: Mapping[str, Any], left: Counter[str]) -> Iterator[Entry]:
    notes = _listed(value, "annotations")
    if not any("caption" in note for note in notes):
        what = "COCO's boxes, without captions" if any("bbox" in note for note in notes) else "an unknown layout"
        raise UserError(f"{file}: {what}; give COCO's captions_*.json; of .json files {LAYOUTS} are read")
    captions: dict[Any, list[str]] = {}
    for note in notes:
        text = note.get("caption")
        if isinstance(text, str) and text.strip():
            captions.setdefault(_id(note.get("image_id")), []).append(text.strip())
        else:
            left["annotation without a caption"] += 1
    seen: dict[Any, str] = {}
    for image in _listed(value, "images"):
        number, name = _id(image.get("id")), image.get("file_name")
        if not isinstance(name, str) or not name:
            left["image without file_name"] += 1
        elif number in seen:
            raise UserError(f"{file}: {seen[number]} and {name} have the same id {number}; give each image its own id")
        else:
            seen[number] = name
            yield Entry(name, tuple(dict.fromkeys(captions.get(number, ()))))
    left["caption of an image that is not listed"] += sum(
        len(texts) for number, texts in captions.items() if number not in seen
    )


def _karpathy(
    file: Path, value: Mapping[str, Any], split: str | None, notes: list[str], left: Counter[str]
) -> Iterator[Entry]:
    images = _listed(value, "images")
    counts = Counter(str(image.get("split", "")) for image in images)
    if split is None and len(counts) > 1:
        restval = " (models are usually trained on train+restval)" if "restval" in counts else ""
        raise several_splits(file, counts, restval)
    wanted = list(counts) if split is None else wanted_splits(file, [name for name in counts if name], split)
    if "train" in wanted and "restval" in counts and "restval" not in wanted:
        notes.append(
            f"{counts['restval']:,} images of the split restval are not read, which models are usually trained on too: "
            "--split train+restval reads both"
        )
    for image in images:
        name, folder = image.get("filename"), image.get("filepath")
        if str(image.get("split", "")) not in wanted:
            continue
        if not isinstance(name, str) or not name:
            left["image without filename"] += 1
            continue
        path = os.path.join(folder, name) if isinstance(folder, str) and folder else name
        yield Entry(path, tuple(dict.fromkeys(filter(None, map(_sentence, _listed(image, "sentences"))))))


def _sentence(sentence: Mapping[str, Any]) -> str:
    raw, tokens = sentence.get("raw"), sentence.get("tokens")
    if isinstance(raw, str) and raw.strip():
        return raw.strip()
    return " ".join(map(str, tokens)) if isinstance(tokens, list) else ""


def _images_folder(file: Path, named: str | None, paths: list[str]) -> Path:
    """The first of the likely folders that holds one of the first images."""
    if named is not None:
        if not Path(named).is_dir():
            raise UserError(f"--images {named}: no such folder")
        likely = [Path(named)]
    else:
        part = file.stem.removeprefix("captions_").removeprefix("dataset_")  # captions_val2014 lie in val2014
        likely = [
            above / name
            for above in (file.parent, file.parent.parent)
            for name in ("", part, "images", f"images/{part}")
        ]
    for folder in likely:
        if any((folder / path).is_file() for path in paths):
            return folder
    where = ", ".join(str(folder) for folder in likely[:4])
    raise UserError(f"{file}: no image {paths[0]} in {where}; give the folder of the images: --images FOLDER")


def _listed(value: Any, name: str) -> list[Mapping[str, Any]]:
    found = value.get(name) if isinstance(value, Mapping) else None
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _id(value: Any) -> Any:
    """An id as COCO's tools compare them: 7 and "7" are one."""
    return str(value) if isinstance(value, int | str) else None
