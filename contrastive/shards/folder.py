"""A folder (or a list) of image files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from contrastive.shards.files import read_regular
from contrastive.shards.left_out import LONE_TEXT
from contrastive.shards.listing import Listing, unread_reason
from contrastive.shards.record import MAX_JSON_BYTES, NumberedSource, Record, SkippedRow
from contrastive.shards.scan import caption_text, json_captions, json_fault
from contrastive.shards.table_values import is_utf8
from contrastive.wording import counted, first_few

SAMPLE = 1000  # caption files that are read at opening, to see whether they have several lines


class ImageFolder(NumberedSource):
    """Image files; the key is the path below the folder, with its extension.

    The text of cat.txt, without white space at its ends, is the one caption of cat.jpg. Without cat.txt, captions come
    from cat.json, and further captions come from it in any case, as in tars. Names are compared without
    regard to case where no name is exactly the same. Without any such file, images in sub-folders have the name of
    their sub-folder as label.

    Args:
        root: the folder; None for a list of files, which has no labels.
        split_level: the level of folders below it that are splits, and no classes.
        found: the files; those that are no image and no caption are counted in `rejected`.
    """

    kind = "images"

    def __init__(self, root: Path | None, found: Listing, split_level: int | None = None) -> None:
        self.files, self.columns = found.images, []
        self.root = root if root is not None else Path(os.path.commonpath([file.parent for file in self.files]))
        self._texts = Captions(found.images, found.texts, [file for file in found.others if _is_json(file)])
        self._split_level = split_level
        parents = {self._folders(file) for file in self.files}
        self._level = None if root is None or self._texts.used else _class_level(parents)
        self.labelled = self._level is not None
        left = [(file, unread_reason(file)) for file in (*found.others, *found.tables, *found.shards, *found.packed)]
        left = [one for one in left if one[0] not in self._texts.used]
        left += [(text, LONE_TEXT) for text in found.texts if text not in self._texts.used]
        self._left = [(self._key(file), reason) for file, reason in left]
        self.left_out = Counter(reason for _, reason in left)
        self._of_captions = list(self._caption_notes())
        self._notes = [*self._of_captions, *self._class_notes(found.folders)]
        if found.hidden:
            self._notes.append(
                f"hidden: {counted(found.hidden, 'image')} of a file or folder whose name begins with a dot"
            )

    @property
    def notes(self) -> list[str]:
        return self._notes

    @property
    def caption_notes(self) -> list[str]:
        return self._of_captions

    def rejections(self) -> Iterator[SkippedRow]:
        return (SkippedRow(key, reason) for key, reason in self._left)

    def _count(self) -> int:
        return len(self.files)

    def _record(self, i: int) -> Record:
        file = self.files[i]
        image, fault = read_regular(file)
        captions, caption_fault, detail = self._texts.read(file)
        return Record(
            key=self._key(file),
            image=image,
            captions=captions,
            label=self._label(file),
            fault=fault or caption_fault,
            detail=None if fault else detail,
        )

    def _key(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _label(self, file: Path) -> str | None:
        if self._level is None:
            return None
        folders = self._folders(file)
        return folders[self._level] if len(folders) > self._level else None

    def _folders(self, file: Path) -> tuple[str, ...]:
        """The folders between the root and a file or folder, without the one that is a split."""
        folders = file.relative_to(self.root).parts[:-1]
        level = self._split_level
        return folders if level is None else folders[:level] + folders[level + 1 :]

    def _may_be_class(self, folder: Path) -> bool:
        """Whether a folder is neither the root nor a split."""
        level = len(folder.relative_to(self.root).parts) - 1
        return level >= 0 and level != self._split_level

    def _caption_notes(self) -> Iterator[str]:
        if not self._texts.of:
            return
        without = len(self.files) - len(self._texts.of) - len(self._texts.faults)
        if without:
            kinds = ".txt or .json" if self._texts.more else ".txt"
            images = counted(len(self.files), "image") + (" has" if len(self.files) == 1 else " have")
            yield f"{without:,} of {images} no caption: no {kinds} file of the same name"
        sample = list(islice((image for image, file in self._texts.of.items() if not _is_json(file)), SAMPLE))
        several = sum("\n" in "".join(self._texts.read(file)[0][:1]) for file in sample)
        if several:
            first = "the first " if len(self._texts.of) > SAMPLE else ""
            verb = "has" if len(sample) == 1 else "have"
            rule = "each file is one caption (several go into metadata.jsonl)"
            yield f"{several:,} of {first}{counted(len(sample), '.txt file')} {verb} several lines: {rule}"

    def _class_notes(self, folders: Sequence[Path]) -> Iterator[str]:
        if self._level is None:
            return
        parents = {self._folders(file) for file in self.files}
        above = next(parts for parts in parents if len(parts) > self._level)[: self._level]
        if above:
            yield f"classes are the folders in {'/'.join(above)}/"
        classes = {parts[self._level] for parts in parents if len(parts) > self._level}
        level = [(*self._folders(path), path.name) for path in folders if self._may_be_class(path)]
        empty = sorted({path[-1] for path in level if path[:-1] == above} - classes)
        if empty:
            yield f"no image in the class folders: {first_few(empty)}"
        outside = [file.name for file in self.files if self._label(file) is None]
        if outside:
            verbs = ("is", "has") if len(outside) == 1 else ("are", "have")
            where = f"{verbs[0]} outside the class folders and {verbs[1]} no label"
            yield f"{counted(len(outside), 'image')} {where}: {first_few(outside)}"


class Captions:
    """The caption files of images.

    of: image to .txt file, or to .json file where it has no .txt. more: image to .json file. used: the caption files
    that belong to an image. faults: images whose caption is not clear, with (reason, detail).

    The .json files count where one of the first SAMPLE that belong to an image holds captions.
    """

    def __init__(self, images: Sequence[Path], texts: Sequence[Path], infos: Sequence[Path] = ()) -> None:
        self.of: dict[Path, Path] = {}
        self.used: set[Path] = set()
        self.faults: dict[Path, tuple[str, str]] = {}
        self._match(images, texts)
        self.more: dict[Path, Path] = {}
        if infos:
            beside = Captions(images, infos)
            if any(_captions_of(file)[0] for file in islice(beside.of.values(), SAMPLE)):
                self.more = {image: file for image, file in beside.of.items() if image not in self.faults}
                self.faults = {
                    image: fault for image, fault in beside.faults.items() if image not in self.of
                } | self.faults
                self.used |= beside.used
                self.of = self.more | self.of

    def _match(self, images: Sequence[Path], texts: Sequence[Path]) -> None:
        named: dict[tuple[Path, str], list[Path]] = {}
        for text in texts:
            named.setdefault((text.parent, text.stem.casefold()), []).append(text)
        if not named:
            return
        owners: dict[Path, list[Path]] = {}
        for image in images:
            found = named.get((image.parent, image.stem.casefold()), [])
            found = [text for text in found if text.stem == image.stem] or found
            self.used.update(found)
            if len(found) > 1:
                self.faults[image] = "caption in several files", " and ".join(text.name for text in found)
            elif found:
                owners.setdefault(found[0], []).append(image)
        for text, own in owners.items():
            own = [image for image in own if image.stem == text.stem] or own
            if len(own) > 1:
                names = f"{' and '.join(image.name for image in own)} with {text.name}"
                self.faults.update((image, ("caption of several images", names)) for image in own)
            else:
                self.of[own[0]] = text

    def read(self, image: Path) -> tuple[tuple[str, ...], str | None, str | None]:
        """The caption as a tuple of one or none; why there is none, and the detail of that."""
        if image in self.faults:
            return (), *self.faults[image]
        text = self.of.get(image)
        if text is not None and _is_json(text):
            return _captions_of(text)
        data, fault = (None, None) if text is None else read_regular(text)
        if fault:
            return (
                (),
                "caption file too large" if fault == "image too large" else "caption not a regular file",
                str(text),
            )
        if data is None:
            return (), None, None
        try:
            caption = caption_text(data)
        except UnicodeDecodeError:
            return (), "caption not UTF-8", str(text)
        further = _captions_of(self.more[image], "captions")[0] if image in self.more else ()
        return tuple(dict.fromkeys((caption, *further))) if caption else (), None, None


def _is_json(file: Path) -> bool:
    return file.suffix.lower() == ".json"


def _captions_of(file: Path, name: str | None = None) -> tuple[tuple[str, ...], str | None, str | None]:
    """The captions of a .json file as tars read it (of the name alone, where one is given), or reason and detail."""
    data, fault = read_regular(file)
    if fault or data is None:
        return (), fault and "caption not a regular file", str(file)
    if len(data) > MAX_JSON_BYTES:
        return (), "text too long", str(file)
    if fault := json_fault(data):
        return (), fault, str(file)
    value = json.loads(data)
    captions = json_captions({name: value.get(name)} if name and isinstance(value, dict) else value)
    if not all(map(is_utf8, captions)):
        return (), "caption not UTF-8", str(file)
    return captions, None, None


def _class_level(parents: set[tuple[str, ...]]) -> int | None:
    """The level of folders that are classes, 0 for the first; None where no image lies in a folder.

    A folder that holds all others, with no image of its own, is no class: classes are the folders in it.
    """
    if not any(parents):
        return None
    level = 0
    while len({parts[: level + 1] for parts in parents}) == 1 and all(len(parts) > level + 1 for parts in parents):
        level += 1
    return level
