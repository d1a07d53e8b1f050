"""Arguments that name no file or folder."""

from __future__ import annotations

import os
import re

from contrastive.errors import UserError

SHOWN = 60  # characters of an argument in a message
NAME_BYTES = 255  # of one part of a path, on every usual file system


def shortened(argument: str) -> str:
    """The argument as messages show it."""
    return argument if len(argument) <= SHOWN else f"{argument[:SHOWN]}…"


def refuse_no_path(argument: str, what: str = "") -> None:
    """Raise UserError for standard input, a data URI, a URL and a name that is too long, with the remedy.

    what: the beginning of the message, such as "IMAGES: ".
    """
    shown = shortened(argument)
    if argument == "-":
        raise UserError(f"{what}standard input is not read; save it as a file and name that")
    if argument.startswith("data:"):
        kind = re.match(r"data:([\w./+-]*)", argument)
        raise UserError(
            f"{what}a data URI ({kind[1] if kind and kind[1] else 'no type'}, {len(argument):,} characters); save it "
            "as a file and name that"
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", argument):
        raise UserError(
            f"{what}{shown}: a URL, which is not read; download it and name the file (for many: img2dataset)"
        )
    if any(len(os.fsencode(part)) > NAME_BYTES for part in argument.split("/")):
        raise UserError(
            f"{what}{shown}: no file has so long a name ({len(argument):,} characters); name a file or folder"
        )
