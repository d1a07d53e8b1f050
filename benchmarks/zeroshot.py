"""Zero-shot weights of ImageNet's 998 distinct class names with 80 templates, beside open_clip's builder, on ViT-B/32.

    python benchmarks/zeroshot.py            a slice of classes by both, the whole by ours, fp32 and bf16
    python benchmarks/zeroshot.py --peer 20 --slice 100

The weights are random: they change neither the time nor what is compared. The peer gets what its builder does by
default (ten classes a batch, 77 tokens a prompt, the model's own precision, gradients off); ours is
`ZeroShotClassifier(...).fit()`, tokenizing included. The peer takes an hour for the whole, so it is timed on a slice;
ours is timed on the same one and on the whole, since prompts share more the more there are. "plain" is ours without
the tree: deduplicated, sorted by length and cut. Prints a table and writes benchmarks/results/zeroshot.json.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from contrastive.evaluation import ZeroShotClassifier, embed_texts
from contrastive.evaluation.prompts import class_prompts
from contrastive.models import open_clip_model

RESULTS = Path(__file__).resolve().parent / "results" / "zeroshot.json"
NAME = "ViT-B-32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=int, default=20, help="classes that the peer is timed on; default 20")
    parser.add_argument("--slice", type=int, default=100, help="classes of the slice by ours; default 100")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--whole", type=int, help="classes of the whole; default all 998")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))  # two of the thousand stand there twice: 998
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    torch.manual_seed(0)
    model = open_clip_model(NAME).eval()
    torch.manual_seed(0)
    peer = open_clip.create_model(NAME, precision="fp32").eval()
    tokenizer = open_clip.get_tokenizer(NAME)

    def ours(classes: int, dtype: torch.dtype | None) -> Callable[[], Any]:
        return lambda: ZeroShotClassifier(model, names[:classes], templates, dtype=dtype).fit().weights_

    def plain(classes: int, dtype: torch.dtype | None) -> Callable[[], Any]:
        prompts = [prompt for own in class_prompts(names[:classes], templates) for prompt in own]
        return lambda: embed_texts(model, prompts, dtype=dtype)

    def theirs() -> Any:
        return open_clip.build_zero_shot_classifier(
            peer, tokenizer, names[: arguments.peer], open_clip.OPENAI_IMAGENET_TEMPLATES
        )

    ours(1, None)(), ours(1, torch.bfloat16)()  # warm up: thread pools, kernels' choice
    rows = []

    def measure(what: str, classes: int, function: Callable[[], Any], precision: str) -> Any:
        started = time.perf_counter()
        value = function()
        seconds = time.perf_counter() - started
        prompts = classes * len(templates)
        rows.append({"what": what, "classes": classes, "precision": precision, "seconds": seconds,
                     "prompts_per_second": prompts / seconds})  # fmt: skip
        if what != "open_clip":
            rows[-1]["times_open_clip"] = rows[-1]["prompts_per_second"] / rows[0]["prompts_per_second"]
        print(
            f"{what:<10} {precision}  {classes:>5} classes  {seconds:8.2f} s  {prompts / seconds:8.1f} prompts/s"
            + (f"  {rows[-1]['times_open_clip']:.1f} x" if what != "open_clip" else ""),
            flush=True,
        )
        return value

    reference = measure("open_clip", arguments.peer, theirs, "fp32").numpy()
    exact = measure("ours", arguments.peer, ours(arguments.peer, None), "fp32")
    rough = measure("ours", arguments.peer, ours(arguments.peer, torch.bfloat16), "bf16")
    measure("plain", arguments.peer, plain(arguments.peer, None), "fp32")
    measure("plain", arguments.peer, plain(arguments.peer, torch.bfloat16), "bf16")
    for classes in (arguments.slice, arguments.whole or len(names)):
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", None)):
            measure("ours", classes, ours(classes, dtype), precision)
    difference = float(np.abs(exact - reference).max())
    cosine = float((rough * reference).sum(axis=0).min())
    print(f"largest difference of a weight, fp32: {difference:.1e}; smallest cosine, bf16: {cosine:.6f}")
    result = {
        "model": NAME, "threads": arguments.threads, "machine": platform.machine(), "torch": torch.__version__,
        "templates": len(templates), "largest_difference_fp32": difference, "smallest_cosine_bf16": cosine,
        "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
