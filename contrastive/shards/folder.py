"""A folder (or a list) of image files."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from contrastive.errors import UserError
from contrastive.shards.files import read_regular
from contrastive.shards.record import Part, Record, Source


class ImageFolder(Source):
    """Image files; the key is the path below the folder, with its extension.

    With sidecars (cat.jpg beside cat.txt) every line that is not empty is a caption, the first being *the*
    caption. Without any, when all images lie in sub-folders, the label is the name of the first sub-folder.
    """

    kind = "images"

    def __init__(self, root: Path | None, files: list[Path]) -> None:
        self.root = root if root is not None else Path(os.path.commonpath([file.parent for file in files]))
        self.files, self.columns = files, []
        has_sidecar = any(file.with_suffix(".txt").exists() for file in files)
        self.labelled = root is not None and not has_sidecar and all(file.parent != root for file in files)

    def _count(self) -> int:
        return len(self.files)

    def _row_starts(self) -> Iterator[Iterable[int]]:
        yield range(len(self.files))

    def read(self, part: Part) -> Iterator[Record]:
        for segment in part.segments:
            yield from self._read(self.files[segment.at : segment.at + segment.rows])

    def _records(self) -> Iterator[Record]:
        return self._read(self.files)

    def _read(self, files: list[Path]) -> Iterator[Record]:
        for file in files:
            name = file.relative_to(self.root)
            image, fault = read_regular(file)
            yield Record(
                key=name.as_posix(),
                image=image,
                captions=() if self.labelled else _captions(file.with_suffix(".txt")),
                label=name.parts[0] if self.labelled else None,
                fault=fault,
            )


def _captions(sidecar: Path) -> tuple[str, ...]:
    try:
        text = sidecar.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        return ()
    except UnicodeDecodeError:
        raise UserError(f"{sidecar}: not UTF-8; save it as UTF-8") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
