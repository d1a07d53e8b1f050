import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def temperature(logits: ArrayLike, target: ArrayLike) -> float:
    rows = np.arange(len(np.asarray(target)))

    def loss(log_t: float) -> float:
        return float(-log_softmax(np.asarray(logits, float) / np.exp(log_t), axis=1)[rows, target].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded").x))


def reliability(probabilities: ArrayLike, target: ArrayLike, bins: int = 15) -> list[dict[str, float]]:
    p = np.asarray(probabilities)
    c = p.max(1)
    r = p.argmax(1) == target
    b = np.clip(np.ceil(c * bins).astype(int) - 1, 0, bins - 1)
    return [
        dict(confidence=float(c[b == k].mean()), accuracy=float(r[b == k].mean()), samples=int((b == k).sum()))
        for k in range(bins)
        if (b == k).any()
    ]


def expected_error(probabilities: ArrayLike, target: ArrayLike, bins: int = 15) -> float:
    rows = reliability(probabilities, target, bins)
    return sum(row["samples"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(np.asarray(target))
