"""The frame of a page: one file without outside references, to read on a desk or a phone, and its small parts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from PIL import Image


def write_page(path: str | Path, title: str, sections: Iterable[str]) -> Path:
    """Write the page to `path` (under a temporary name first) and return it; empty sections are left out."""
    style = files("contrastive.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    title = html.escape(title)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style></head>\n<body><main>\n<h1>{title}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


def section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>\n{note}{body}</section>" if body else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of text cells, which are escaped; wider than the page, it scrolls by itself. "" without rows."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    title = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    head = f"<thead><tr>{title}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>\n'


def figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def details(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>" if text else ""


def picture(image: Image.Image, alt: str) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alt, quote=True)}">'


def percent(share: float | None, unit: str = " %", digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}{unit}"
