"""A page to look at a set of shards by: its card, a sheet of thumbnails with their captions, what was left out."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contrastive.shards.card import card_rows
from contrastive.shards.decode import decode_image
from contrastive.shards.index import ShardIndex
from contrastive.shards.record import Rejected

SHOWN = 96
SIDE = 128
MAX_CAPTION = 160  # characters shown
LEFT_OUT = 50  # rejections listed

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #1b1f24; background: #fafafa }}
main {{ max-width: 1180px; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.05rem; margin-top: 1.8rem }}
dl {{ background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .8rem; font-size: 13px; margin: 0;
  display: grid; grid-template-columns: fit-content(7.5rem) 1fr; gap: .15rem 1rem }}
dt {{ font-weight: 600 }} dt.part {{ font-weight: 400; padding-left: .8rem }}
dd {{ margin: 0; overflow-wrap: anywhere }}
ul.sheet {{ list-style: none; padding: 0; display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)) }}
ul.sheet li {{ background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .4rem; font-size: 12px }}
ul.sheet img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f1f1f1; border-radius: 4px }}
ul.sheet span {{ display: block; overflow-wrap: anywhere }} ul.sheet small {{ color: #667; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ text-align: left; padding: .2rem .8rem .2rem 0; overflow-wrap: anywhere }}
</style></head><body><main>
<h1>{title}</h1>
<dl>{card}</dl>
{sections}
</main></body></html>
"""


def write_contact_sheet(path: str | Path, index: ShardIndex, card: dict[str, Any], name: str) -> Path:
    """Write the page, one file without outside references; nothing from the shards is taken for markup."""
    spread = np.unique(np.linspace(0, len(index) - 1, min(len(index), SHOWN)).astype(int)).tolist()
    text, image = index.sizes[:, 1], index.sizes[:, 0]
    odd = {
        "longest captions": np.argsort(-text, kind="stable")[:8],
        "shortest captions": np.argsort(text, kind="stable")[:8],
        "largest images, in bytes": np.argsort(-image, kind="stable")[:8],
        "smallest images, in bytes": np.argsort(image, kind="stable")[:8],
    }
    sections = [_sheet(index, f"{len(spread)} of {len(index):,} pairs, evenly spread", spread)]
    sections += [_sheet(index, f"The {what}", numbers.tolist()) for what, numbers in odd.items()]
    sections.append(_left_out(index.manifest["rejected"]))
    page = _PAGE.format(title=html.escape(name), card=_listed(card), sections="\n".join(filter(None, sections)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _listed(card: dict[str, Any]) -> str:
    return "".join(
        f"<dt{' class=part' if label.startswith(' ') else ''}>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>"
        for label, text in card_rows(card)
    )


def _sheet(index: ShardIndex, title: str, numbers: list[int]) -> str:
    return f'<h2>{html.escape(title)}</h2>\n<ul class="sheet">{"".join(_cell(index, i) for i in numbers)}</ul>'


def _cell(index: ShardIndex, i: int) -> str:
    caption = index.caption(i)
    shown = caption if len(caption) <= MAX_CAPTION else f"{caption[:MAX_CAPTION]}… ({len(caption):,} characters)"
    try:
        image = decode_image(index.image(i))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<img loading="lazy" alt="{html.escape(shown)}" src="data:image/webp;base64,{data}">'
    except Rejected as fault:
        picture = f"<em>{html.escape(fault.reason)}</em>"
    return f"<li>{picture}<span>{html.escape(shown)}</span><small>{html.escape(index.key(i))}</small></li>"


def _left_out(rejected: list[dict[str, str]]) -> str:
    if not rejected:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(one['shard'])}</td><td>{html.escape(one['key'])}</td>"
        f"<td>{html.escape(one['reason'])}</td></tr>"
        for one in rejected[:LEFT_OUT]
    )
    head = "<tr><th>shard</th><th>key</th><th>reason</th></tr>"
    return f"<h2>Left out: {len(rejected):,}, of which the first {LEFT_OUT}</h2>\n<table>{head}{rows}</table>"
