"""The training loader beside open_clip's on the same shards, one worker each, and what decoding alone could do.

    pip install --no-deps --target build/peer-webdataset webdataset==0.2.86     # the release that open_clip_train pins
    python benchmarks/loader.py                     both cases; 20,000 photographs are made once, in build/ (minutes)
    python benchmarks/loader.py --images 2000 --rounds 3
    python benchmarks/loader.py --once exact        one short run for against.py: a JSON line with seconds a batch

Case "pictograms": the shipped set, WebP of 64 px, at 64 px. Case "photographs": JPEGs of 400 to 800 px a side, quality
90, cut from scikit-image's pictures, at 224 px. Both sides crop 0.9 to 1 of the area at random, resize bicubic and
tokenize with open_clip's tokenizer; both deliver normalised float32 pixels in the main process (ours leave the loader
as bytes and are normalised there, as the training step does). open_clip's pipeline is its own `get_wds_dataset`, with
its shuffle buffer of 5,000 samples.

The systems take turns, each in a process of its own. Of a turn, the batches that were ready before it do not count;
the median of the rounds does. "worker MiB": the peak resident set of the worker process (private memory in brackets).
"of the limit": samples a second over those of libjpeg-turbo alone (`simplejpeg.decode_jpeg`) on the same bytes at the
scale that the loader decodes, in one process without anything else, measured in turns too. Keep the machine idle
otherwise.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loader.json"
PEER_WEBDATASET = ROOT / "build" / "peer-webdataset"
BATCH = 256
READY = 3  # batches that a loader may have prepared before its turn, and one under way
CASES = {"pictograms": 64, "photographs": 224}
SYSTEMS = {"pictograms": ["open_clip", "exact"], "photographs": ["open_clip", "exact", "fast"]}
ONCE = 12  # batches of a short run
LIMITS = {"exact": "limit, whole", "fast": "limit, scaled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=20_000, help="photographs to make")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help=f"of {BATCH} samples, that a turn counts")
    parser.add_argument("--serve", nargs=3, metavar=("SYSTEM", "SHARDS", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--once", choices=["exact", "fast"], help="a few batches of this loader on 1,000 photographs")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(once(arguments.once)))
        return
    if arguments.serve:
        system, shards, size = arguments.serve
        serve(system, Path(shards), int(size))
        return
    if not (PEER_WEBDATASET / "webdataset").is_dir():
        sys.exit(f"{PEER_WEBDATASET} is missing; see the top of this file")
    cases = {}
    for case in arguments.cases:
        shards = ROOT / "data" / "pictograms" / "shards" / "train"
        if case == "photographs":
            shards = photographs(arguments.images)
        cases[case] = compare(case, shards, arguments.rounds, arguments.batches)
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, **cases}, indent=2) + "\n")


def once(decode: str) -> dict[str, float]:
    """Seconds a batch, after the first ones: elapsed, and of the processors of this process and its worker."""
    import torch
    from making import once_table

    from contrastive.shards import make_shards, open_source

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(open_source(once_table()), Path(folder) / "shards")
        batches = our_batches(Path(folder) / "shards", CASES["photographs"], decode)
        for _ in range(READY + 1):
            next(batches)
        worker = newest_child()
        started, used = time.perf_counter(), time.process_time() + processor_time(worker)
        for _ in range(ONCE):
            next(batches)
        elapsed, busy = time.perf_counter() - started, time.process_time() + processor_time(worker) - used
        batches.close()  # type: ignore[attr-defined]
    return {"seconds a batch": elapsed / ONCE, "processor seconds a batch": busy / ONCE}


def processor_time(process: int) -> float:
    """Seconds that a process has computed; Linux."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the parent: turns


def compare(case: str, shards: Path, rounds: int, batches: int) -> dict[str, Any]:
    """All systems of a case in turns; prints the table."""
    systems = [*SYSTEMS[case], *(LIMITS.values() if case == "photographs" else [])]
    servers = {system: start(system, shards, CASES[case]) for system in systems}
    rates: dict[str, list[float]] = {system: [] for system in systems}
    for turn in range(rounds + 1):
        for system, server in servers.items():
            rate = ask(server, f"run {batches}")["rate"]
            if turn:  # the first is the warm-up
                rates[system].append(rate)
    found: dict[str, Any] = {"shards": shards.name, "batches": batches, "rounds": rounds, "systems": {}}
    medians = {system: statistics.median(values) for system, values in rates.items()}
    print(f"{case}, {CASES[case]} px, one worker, medians of {rounds} turns of {batches * BATCH:,} samples")
    for system in systems:
        memory = ask(servers[system], "memory")
        row = {"samples_per_second": medians[system], "rates": rates[system], **memory}
        row["of_open_clip"] = medians[system] / medians["open_clip"]
        text = f"  {system:14} {medians[system]:8,.0f} samples/s  {row['of_open_clip']:5.2f} x open_clip"
        if memory["worker_mib"]:
            text += f"  worker {memory['worker_mib']:6,.0f} MiB ({memory['worker_private_mib']:,.0f})"
        if LIMITS.get(system) in medians:
            row["of_limit"] = medians[system] / medians[LIMITS[system]]
            text += f"  {row['of_limit']:.0%} of the limit"
        print(text, flush=True)
        found["systems"][system] = row
        servers[system].kill()
    return found


def start(system: str, shards: Path, size: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([*([str(PEER_WEBDATASET)] if system == "open_clip" else []), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", system, str(shards), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def ask(server: subprocess.Popen[str], request: str) -> dict[str, Any]:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(request + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError(f"{' '.join(map(str, server.args))} ended; run it by hand")  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads(answer)
    return found


# ---- the children


def serve(system: str, shards: Path, size: int) -> None:
    """Answer `run N` with the rate of N batches and `memory` with that of the worker."""
    import torch

    torch.set_num_threads(1)
    make: dict[str, Callable[[], Iterator[int]]] = {
        "open_clip": lambda: peer_batches(shards, size),
        "exact": lambda: our_batches(shards, size, "exact"),
        "fast": lambda: our_batches(shards, size, "fast"),
        LIMITS["exact"]: lambda: decoded(shards, size, scaled=False),
        LIMITS["fast"]: lambda: decoded(shards, size, scaled=True),
    }
    batches, worker = make[system](), 0
    for line in sys.stdin:
        if line.startswith("memory"):
            print(json.dumps(memory_of(worker)), flush=True)
            continue
        for _ in range(READY):
            next(batches)
        worker = worker or newest_child()
        started = time.perf_counter()
        samples = sum(next(batches) for _ in range(int(line.split()[1])))
        print(json.dumps({"rate": samples / (time.perf_counter() - started)}), flush=True)


def peer_batches(shards: Path, size: int) -> Iterator[int]:
    """open_clip's own training pipeline."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    args = SimpleNamespace(
        train_data=os.fspath(shards) + "/{" + f"{Path(urls[0]).stem}..{Path(urls[-1]).stem}" + "}.tar",
        train_num_samples=1 << 40, train_data_upsampling_factors=None, dataset_resampled=False, seed=0,
        batch_size=BATCH, workers=1, world_size=1,
    )  # fmt: skip
    transform = image_transform(size, is_train=True)
    loader = get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.SimpleTokenizer()).dataloader
    while True:
        for pixels, tokens in loader:
            assert pixels.shape[1:] == (3, size, size) and tokens.shape[1] == 77
            yield len(pixels)


def our_batches(shards: Path, size: int, decode: str) -> Iterator[int]:
    import torch

    from contrastive.models import OpenClipTokenizer
    from contrastive.shards import Augment, PairLoader, TokenCache, open_index

    tokenizer = OpenClipTokenizer()
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    loader = PairLoader(
        open_index(shards), tokenize=TokenCache(tokenizer, tokenizer.pad_id), image_size=size,
        augment=Augment(crop=(0.9, 1.0)), global_batch=BATCH, workers=1, decode=decode,
    )  # fmt: skip
    for batch in loader:
        pixels = batch.pixels.float().sub_(mean).div_(std)
        assert pixels.shape[1:] == (3, size, size) and bool(batch.valid.all())
        yield len(pixels)


def decoded(shards: Path, size: int, scaled: bool) -> Iterator[int]:
    """libjpeg-turbo alone, in this process: the bytes are in memory already, and so are the pages of the pixels."""
    import simplejpeg

    from contrastive.shards import Augment, open_index
    from contrastive.shards.augment import DRAWS, crop_of
    from contrastive.shards.order import draws

    index = open_index(shards)
    images = [index.image(i) for i in range(0, len(index), max(1, len(index) // 1024))]
    import numpy as np

    numbers = draws(0, np.zeros(len(images), np.int64), np.arange(len(images)), DRAWS).tolist()
    least: list[dict[str, int]] = []
    for data, u in zip(images, numbers, strict=True):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _, _, crop_width, crop_height = crop_of(width, height, Augment(crop=(0.9, 1.0)), u)
        factor = max(power for power in (1, 2, 4, 8) if power == 1 or power <= min(crop_width, crop_height) / size)
        least.append({"min_height": height // factor, "min_width": width // factor} if scaled and factor > 1 else {})
    at, pixels = 0, np.zeros(3 * 1000 * 1000, np.uint8)
    while True:
        for _ in range(BATCH):
            simplejpeg.decode_jpeg(images[at], "RGB", buffer=pixels, **least[at])
            at = (at + 1) % len(images)
        yield BATCH


def newest_child() -> int:
    """The process that this one started last, 0 if none; Linux."""
    found = [int(p) for task in Path("/proc/self/task").iterdir() for p in (task / "children").read_text().split()]
    return max(found, default=0)


def memory_of(process: int) -> dict[str, float]:
    if not process:
        return {"worker_mib": 0, "worker_private_mib": 0}
    status = Path(f"/proc/{process}/status").read_text()
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    return {"worker_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024, "worker_private_mib": private / 1024}


# ---- the photographs


def photographs(count: int) -> Path:
    """Shards of `count` JPEG photographs, made at the first use."""
    from skimage import data

    from contrastive.shards import Record, Source, make_shards

    shards = ROOT / "build" / f"photographs-{count}"
    if shards.exists():
        return shards
    import numpy as np
    from PIL import Image

    folder = Path(data.__file__).parent
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg",
             "motorcycle_left.png", "motorcycle_right.png", "ihc.png"]  # fmt: skip
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    print(f"making {count:,} photographs in {shards}", file=sys.stderr)
    rng = np.random.default_rng(0)

    class Photographs(Source):
        """Pictures that are cut and encoded when they are written, in order, and never held together."""

        kind, columns, files = "photographs", [], []  # type: ignore[var-annotated]

        def read(self, part: Any) -> Iterator[Record]:
            for i in range(part.row, part.row + part.records):
                picture = pictures[i % len(pictures)]
                width, height = (int(side) for side in rng.integers(400, 801, size=2))
                share = rng.uniform(0.5, 1)
                left, top = (rng.uniform(0, side * (1 - share)) for side in picture.size)
                box = (left, top, left + share * picture.width, top + share * picture.height)
                buffer = io.BytesIO()
                picture.resize((width, height), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=90)
                caption = f"{names[i % len(names)].split('.')[0]}, cut number {i}"
                yield Record(f"{i:06d}", buffer.getvalue(), (caption,))

        def identity(self) -> dict[str, Any]:
            return {"kind": self.kind, "count": count}

        def _row_starts(self) -> Iterator[range]:
            yield range(count)

    make_shards(Photographs(), shards)
    return shards


if __name__ == "__main__":
    main()
