"""A tiny two-tower model under DDP on 1, 2 and 4 gloo ranks against the same batch on one process."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.losses import InfoNCE, Margin
from tests.distributed.spawn import run_ranks
from tests.losses.dense import infonce_dense, margin_dense, relative_error

ROWS, DIM = 12, 6  # of the global batch; 12 rows divide among 1, 2 and 4 ranks
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
LOSSES: dict[str, nn.Module] = {
    "infonce": InfoNCE(),
    "infonce ignore": InfoNCE(same_caption="ignore"),
    "infonce positive": InfoNCE(same_caption="positive"),
    "infonce smoothed": InfoNCE(same_caption="ignore", label_smoothing=0.1),
    "margin": Margin(),
    "margin ignore": Margin(same_caption="ignore"),
    "margin hardest": Margin(hardest=True, same_caption="ignore"),
}


class TinyPair(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text = nn.Linear(5, DIM), nn.Linear(7, DIM)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))
        self.to(dtype)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image": F.normalize(self.image(image), dim=1),
            "text": F.normalize(self.text(text), dim=1),
            "scale": self.logit_scale.exp(),
            "bias": self.logit_bias,
        }


def global_batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(ROWS, 7, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 5, 8, 0, 10, 11])
    # uneven: of four ranks with three rows, the first has none that is valid, the second one, the last all
    valid = torch.tensor([0, 0, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    return image, text, ids, valid


def step(model: nn.Module, loss: Any, batch: tuple[Tensor, ...], **extra: Tensor) -> dict[str, Tensor]:
    """The scalars of the loss and the gradient of every parameter, by name."""
    model.zero_grad()
    outputs = model(batch[0], batch[1])
    scalars = loss(outputs["image"], outputs["text"], outputs["scale"], outputs["bias"], **extra)
    scalars["loss"].backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {key: value.detach() for key, value in scalars.items()} | {
        f"grad {name}": parameter.grad.clone() for name, parameter in plain.named_parameters()
    }


class OpenClip:
    """The peer in the setting in which its gradient is right on several ranks."""

    def __init__(self, rank: int, world: int) -> None:
        self.loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

    def __call__(self, *arguments: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(*arguments)}


def all_cases(rank: int, world: int) -> dict[tuple, dict[str, Tensor]]:
    """Every loss on this rank's slice; run once a world because starting ranks takes most of the time."""
    results = {}
    for dtype in TOLERANCE:
        n = ROWS // world
        image, text, ids, valid = (x[rank * n : (rank + 1) * n] for x in global_batch(dtype))
        model = DistributedDataParallel(TinyPair(dtype))
        for name, loss in LOSSES.items():
            results[name, dtype, "all"] = step(model, loss, (image, text), ids=ids)
            results[name, dtype, "uneven"] = step(model, loss, (image, text), ids=ids, valid=valid)
        results["open_clip", dtype, "all"] = step(model, OpenClip(rank, world), (image, text))
    return results


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda world: f"{world}-ranks")
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return run_ranks(request.param, all_cases)


def mean_over_ranks(ranks: list[dict], *case: object) -> dict[str, Tensor]:
    return {key: torch.stack([rank[case][key] for rank in ranks]).mean(dim=0) for key in ranks[0][case]}


def dense(name: str, rows: str) -> dict[str, Tensor]:
    """The oracle: one process, float64, loops over the whole batch."""
    image, text, ids, valid = global_batch(torch.float64)
    module = LOSSES[name]

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
        kept = valid if rows == "uneven" else None
        if isinstance(module, InfoNCE):
            value = infonce_dense(image, text, scale, ids, kept, module.same_caption, module.label_smoothing)
        else:
            value = margin_dense(image, text, ids, kept, module.same_caption, module.margin, module.hardest)
        return {"loss": value + 0 * (scale + bias)}

    return step(TinyPair(torch.float64), loss, (image, text))


@pytest.mark.parametrize("rows", ["all", "uneven"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_mean_over_ranks_is_the_global_loss_and_gradient(
    ranks: list[dict], name: str, dtype: torch.dtype, rows: str
) -> None:
    found, expected = mean_over_ranks(ranks, name, dtype, rows), dense(name, rows)
    errors = {key: relative_error(found[key], value) for key, value in expected.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_infonce_is_open_clip_on_as_many_ranks(ranks: list[dict], dtype: torch.dtype) -> None:
    found = mean_over_ranks(ranks, "infonce", dtype, "all")
    for key, expected in mean_over_ranks(ranks, "open_clip", dtype, "all").items():
        if key == "grad logit_bias":  # zero here, rounding there
            assert found[key] == 0 and abs(expected) < TOLERANCE[dtype]
        else:
            assert relative_error(found[key], expected) < TOLERANCE[dtype], key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", ["all", "uneven"])
def test_logged_scalars_average_to_those_of_one_process(ranks: list[dict], name: str, rows: str) -> None:
    image, text, ids, valid = global_batch(torch.float64)
    extra = {"ids": ids} | ({"valid": valid} if rows == "uneven" else {})
    expected = step(TinyPair(torch.float64), LOSSES[name], (image, text), **extra)
    found = mean_over_ranks(ranks, name, torch.float64, rows)
    for key in expected:
        if not key.startswith("grad"):
            assert found[key].item() == pytest.approx(expected[key].item(), rel=1e-12), key


def unequal(rank: int, world: int) -> str:
    rows = 3 + rank
    try:
        InfoNCE()(torch.eye(rows, 5), torch.eye(rows, 5), torch.tensor(1.0))
    except AssertionError as error:
        return str(error)
    return "no error"


def test_unequal_local_batches_are_refused_on_every_rank() -> None:
    assert all(message.startswith("local batches of [3, 4] rows") for message in run_ranks(2, unequal))
