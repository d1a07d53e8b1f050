"""What was predicted for every image, as a table that other programs read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """keys, truth: lists of N.  tasks: name -> (classes (K,), probabilities float (N, K))."""

    keys: list[str]
    truth: list[str]
    tasks: dict[str, tuple[list[str], NDArray[np.floating]]] = field(default_factory=dict)


def write_predictions(path: str | Path, found: Predictions, *, top_k: int = 5) -> Path:
    """Write a Parquet file with one row an image and return its path.

    Columns: `key`, `label`, and for each task `TASK` (the likeliest class), `TASK_labels` and `TASK_probabilities`
    (lists of the `top_k` likeliest, best first).
    """
    import pyarrow as pa
    import pyarrow.parquet

    columns: dict[str, pa.Array] = {
        "key": pa.array(found.keys, pa.string()),
        "label": pa.array(found.truth, pa.string()),
    }
    for task, (classes, probabilities_NK) in found.tasks.items():
        order_NT = np.argsort(-probabilities_NK, axis=1, kind="stable")[:, :top_k]
        names_NT = np.asarray(classes, dtype=object)[order_NT]
        top_NT = np.take_along_axis(probabilities_NK, order_NT, axis=1).astype(np.float32)
        columns[task] = pa.array(names_NT[:, 0].tolist(), pa.string())
        columns[f"{task}_labels"] = pa.array(names_NT.tolist(), pa.list_(pa.string()))
        columns[f"{task}_probabilities"] = pa.array(top_NT.tolist(), pa.list_(pa.float32()))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(pa.table(columns), unfinished)
    unfinished.replace(path)
    return path
