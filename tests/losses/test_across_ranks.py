"""A tiny two-tower model on 1, 2 and 4 gloo ranks against the same batch on one process."""

from functools import partial
from itertools import product
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.errors import UserError
from contrastive.losses import CyCLIP, InfoNCE, SigLIP, SogCLR, WeightedSum, distillation, infonce, siglip, tiled
from contrastive.training import cached_backward
from tests.distributed.spawn import run_ranks
from tests.losses.dense import features, margin_gap, of_rows, relative_error
from tests.losses.every_loss import TILED, VARIANTS, extras
from tests.losses.largest import LargestTensor

DIM, SEED = 16, 12
# Local batches are odd everywhere: 301, 151 and 75. A tile of 64 is the first to divide none of them.
ROWS = {1: 301, 2: 302, 4: 300}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# tile and exchange; the plain loss gathers
ENGINES: list[tuple[int | str | None, str]] = [(None, "auto"), *product((64, 1000, "auto"), ("gather", "ring"))]


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


def global_batch(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    # the seed is one at which no margin's hinge is within rounding of 0: see the test of that
    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    # 200 captions among 300 pairs: some are there twice and more, on one rank and on several
    ids = torch.randint(0, 200, (rows,), generator=generator)
    # and as many images, shared by other rows
    images = torch.randint(0, 200, (rows,), generator=torch.Generator().manual_seed(SEED + 1))
    # uneven: of four ranks the first has no row that is valid, the second 10, the last all
    valid = torch.arange(rows) >= rows // 4
    valid &= ~((torch.arange(rows) >= rows // 4 + 10) & (torch.arange(rows) < rows // 2))
    text = torch.cat([image, image[:, :2]], dim=1) + torch.randn(rows, 7, generator=generator, dtype=torch.float64)
    both = torch.stack([ids, images], dim=1)
    return {"image": image.to(dtype), "text": text.to(dtype), "ids": ids, "both": both, "valid": valid}


def results(model: nn.Module, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 0-d values of the loss and the gradient of every parameter, by name."""
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {key: value.detach() for key, value in scalars.items() if value.ndim == 0} | {
        f"grad {name}": parameter.grad.clone() for name, parameter in plain.named_parameters()
    }


def step(model: nn.Module, loss: Any, image: Tensor, text: Tensor, **extra: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(image, text)
    scalars = loss(outputs["image"], outputs["text"], outputs["scale"], outputs["bias"], **extra)
    scalars["loss"].backward()
    return results(model, scalars)


def chunked_step(model: nn.Module, loss: Any, image: Tensor, text: Tensor, **extra: Any) -> dict[str, Tensor]:
    """The same with the towers run in three chunks, and again for their gradients (GradCache)."""
    model.zero_grad()

    def of_output(out: dict[str, Tensor]) -> dict[str, Tensor]:
        return loss(out["image"], out["text"], out["scale"], out["bias"], **extra)

    return results(model, cached_backward(model, image, text, of_output, chunk=-(-len(image) // 3)))


def ids_and_valid(batch: dict[str, Tensor], uneven: bool) -> dict[str, Tensor]:
    """Even: ids of captions. Uneven: rows that are not valid, and ids of captions and images."""
    return {"ids": batch["both"], "valid": batch["valid"]} if uneven else {"ids": batch["ids"]}


def all_cases(rank: int, world: int, dtype: torch.dtype) -> dict[tuple, dict[str, Tensor]]:
    """Every loss on this rank's slice in every way; all in one go because starting ranks takes seconds."""
    found = {}
    tiled.AUTO_TILE["cpu"] = 64  # so that "auto", which keeps its tiles between the sweeps, has several
    rows, n = ROWS[world], ROWS[world] // world
    here = slice(rank * n, (rank + 1) * n)
    batch = of_rows(here, global_batch(rows, dtype))
    model = DistributedDataParallel(TinyPair(dtype))
    for name, variant in VARIANTS.items():
        further = variant.options | of_rows(here, extras(variant, rows))
        for (tile, exchange), uneven in product(ENGINES if variant.tiled else ENGINES[:1], (False, True)):
            engine = {"tile": tile, "exchange": exchange} if variant.tiled else {}
            extra = further | engine | ids_and_valid(batch, uneven)
            arguments = variant.function, batch["image"], batch["text"]
            found[name, uneven, tile, exchange, "whole"] = step(model, *arguments, **extra)
            if uneven:  # the harder half; the other would add a quarter to the time
                found[name, uneven, tile, exchange, "chunked"] = chunked_step(model, *arguments, **extra)
    return found


def mean_over_ranks(ranks: list[dict], *case: object) -> dict[str, Tensor]:
    """As DDP averages gradients (once more where it has done so already)."""
    return {key: torch.stack([rank[case][key] for rank in ranks]).mean(dim=0) for key in ranks[0][case]}


def oracle_arguments(name: str, rows: int, uneven: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The valid rows of the global batch in float64, and what the oracle wants beside them."""
    batch = global_batch(rows, torch.float64)
    keep = batch["valid"] if uneven else torch.ones(rows, dtype=torch.bool)
    batch["ids"] = ids_and_valid(batch, uneven)["ids"]
    return of_rows(keep, batch), VARIANTS[name].options | of_rows(keep, extras(VARIANTS[name], rows))


def expected_of_one_process(name: str, rows: int, uneven: bool) -> dict[str, Tensor]:
    batch, further = oracle_arguments(name, rows, uneven)

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"loss": VARIANTS[name].matrix(image, text, scale, bias, batch["ids"], **further) + 0 * (scale + bias)}

    return step(TinyPair(torch.float64), loss, batch["image"], batch["text"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", ROWS)
def test_mean_over_ranks_is_the_global_loss_and_gradient_in_every_way(world: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(world, all_cases, dtype)
    errors, expected = {}, {}
    for name, uneven, *way in ranks[0]:
        if (name, uneven) not in expected:
            expected[name, uneven] = expected_of_one_process(name, ROWS[world], uneven)
        found = mean_over_ranks(ranks, name, uneven, *way)
        for key, value in expected[name, uneven].items():
            errors[(name, uneven, *way, key)] = relative_error(found[key], value)
    assert (
        len(errors) == (len(TILED) * len(ENGINES) + 1) * 3 * 7
    )  # whole, uneven, uneven in chunks; the loss and six parameters
    wrong = {case: error for case, error in errors.items() if error > TOLERANCE[dtype]}
    assert not wrong, wrong


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("margin")])
@pytest.mark.parametrize("rows", ROWS.values())
def test_rounding_decides_no_hinge_of_these_batches(name: str, rows: int) -> None:
    # float32 similarities are off by 1e-7, and a lead of less than 8 eps = 9.5e-7 is a tie; were a hinge nearer to its
    # bend than that, the test above would compare two gradients that are both right
    for uneven in (False, True):
        batch, further = oracle_arguments(name, rows, uneven)
        out = TinyPair(torch.float64)(batch["image"], batch["text"])
        assert margin_gap(out["image"], out["text"], out["scale"], out["bias"], batch["ids"], **further) > 1.2e-6


def logged(rank: int, world: int, tile: int | None) -> dict[tuple, dict[str, Tensor]]:
    found = {}
    n = 60 // world
    here = slice(rank * n, (rank + 1) * n)
    batch = of_rows(here, global_batch(60, torch.float64))
    model = TinyPair(torch.float64)
    for name, variant in VARIANTS.items():
        further = variant.options | of_rows(here, extras(variant, 60)) | ({"tile": tile} if variant.tiled else {})
        further |= {"ids": batch["ids"] % 40, "valid": batch["valid"]}
        found[(name,)] = step(model, variant.function, batch["image"], batch["text"], **further)
    return found


def test_logged_values_average_to_those_of_one_process() -> None:
    one, two = logged(0, 1, None), run_ranks(2, logged, 16)
    for case in one:
        for key, value in mean_over_ranks(two, *case).items():
            if not key.startswith("grad"):
                assert value.item() == pytest.approx(one[case][key].item(), rel=1e-12), (case, key)


# ---- open_clip on as many ranks

TEACHER_SCALE = 30.0


def beside_open_clip(rank: int, world: int) -> dict[tuple, dict[str, Tensor]]:
    """open_clip's losses, each in the settings in which its gradient is right, and ours."""
    found = {}
    tiled.AUTO_TILE["cpu"] = 64  # so that "auto", which keeps its tiles between the sweeps, has several
    rows, n = ROWS[world], ROWS[world] // world
    here = slice(rank * n, (rank + 1) * n)
    setting = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world}
    for dtype in TOLERANCE:
        batch = of_rows(here, global_batch(rows, dtype))
        teacher = [x[here].to(dtype) for x in extras(VARIANTS["distillation"], rows).values()]
        teacher_options = dict(zip(("teacher_image", "teacher_text"), teacher, strict=True))
        clip, distill = open_clip.ClipLoss(**setting), DistillClipLoss(**setting)
        model = DistributedDataParallel(TinyPair(dtype))

        def theirs(loss: Any, *further: Any) -> Any:
            def call(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
                arguments = further or (bias,)
                value = loss(image, text, scale, *arguments)
                return {"loss": (value[1] if isinstance(value, tuple) else value) + 0 * bias}

            return call

        def run(name: str, loss: Any, **options: Any) -> None:
            found[name, dtype] = step(model, loss, batch["image"], batch["text"], **options)  # noqa: B023

        run("infonce", infonce, tile=64)
        run("ClipLoss", theirs(clip))
        run("siglip", siglip, tile=64)
        for implementation in ("bidir", "shift", "reduce", "gather"):
            run(implementation, theirs(SigLipLoss(rank=rank, world_size=world, dist_impl=implementation)))
        run("distillation", distillation, tile=64, teacher_scale=TEACHER_SCALE, **teacher_options)
        run("DistillClipLoss", theirs(distill, *teacher, torch.tensor(TEACHER_SCALE, dtype=dtype)))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_open_clip_on_as_many_ranks(world: int) -> None:
    ranks = run_ranks(world, beside_open_clip)
    pairs = [("infonce", "ClipLoss"), ("distillation", "DistillClipLoss")]
    pairs += [("siglip", implementation) for implementation in ("bidir", "shift", "reduce", "gather")]
    errors = {}
    for dtype, (ours, theirs) in product(TOLERANCE, pairs):
        found, expected = mean_over_ranks(ranks, ours, dtype), mean_over_ranks(ranks, theirs, dtype)
        for key, value in expected.items():
            if key == "grad logit_bias" and ours != "siglip":  # cancels: exactly zero here, rounding there
                assert found[key] == 0 and abs(value) < TOLERANCE[dtype]
            else:
                errors[theirs, dtype, key] = relative_error(found[key], value) / TOLERANCE[dtype]
    assert len(errors) == 2 * (2 * 6 + 4 * 7)
    assert max(errors.values()) < 1, errors


# ---- what moves between ranks, and groups of ranks


def in_subgroups(rank: int, world: int) -> dict[tuple, dict[str, Tensor]]:
    """Ranks 0 and 2 are one global batch, ranks 1 and 3 another."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group, place = groups[rank % 2], rank // 2
    here = slice(place * 15, (place + 1) * 15)
    batch = of_rows(here, global_batch(30, torch.float64))
    found = {}
    for name, variant in VARIANTS.items():
        further = variant.options | of_rows(here, extras(variant, 30)) | {"ids": batch["ids"], "group": group}
        if rank % 2:  # the other group has other captions, so that mixing the two up would show
            further["ids"] = further["ids"] // 2
        for exchange in ("gather", "ring") if variant.tiled else ("none",):
            engine = {"tile": 7, "exchange": exchange} if variant.tiled else {}
            images = batch["image"].flip(1) if rank % 2 else batch["image"]
            model = TinyPair(torch.float64)
            found[name, exchange] = step(model, variant.function, images, batch["text"], **further, **engine)
    return found


def test_a_group_of_ranks_is_a_global_batch_of_its_own() -> None:
    ranks = run_ranks(4, in_subgroups)
    batch = global_batch(30, torch.float64)
    for which, (name, variant) in product((0, 1), VARIANTS.items()):
        images = batch["image"].flip(1) if which else batch["image"]
        extra = extras(variant, 30) | variant.options

        def loss(*arguments: Tensor) -> dict[str, Tensor]:
            ids = batch["ids"] // 2 if which else batch["ids"]  # noqa: B023
            return {"loss": variant.matrix(*arguments, ids, **extra) + 0 * sum(arguments[2:])}  # noqa: B023

        expected = step(TinyPair(torch.float64), loss, images, batch["text"])
        for exchange in ("gather", "ring") if variant.tiled else ("none",):
            found = mean_over_ranks(ranks[which::2], name, exchange)
            for key, value in expected.items():
                assert relative_error(found[key], value) < 1e-12, (which, name, exchange, key)


def largest_and_gradients(rank: int, world: int) -> dict[tuple, Any]:
    n = 40
    here = slice(rank * n, (rank + 1) * n)
    batch = of_rows(here, global_batch(n * world, torch.float64))
    found: dict[tuple, Any] = {}
    for name, variant in TILED.items():
        further = variant.options | of_rows(here, extras(variant, n * world)) | {"ids": batch["ids"]}
        out = TinyPair(torch.float64)(batch["image"], batch["text"])
        # of 100 dimensions, so that features outweigh tiles
        wide = F.pad(out["image"].detach(), (0, 84)).requires_grad_()
        for exchange in ("gather", "ring"):
            with LargestTensor() as largest:
                text = F.pad(out["text"].detach(), (0, 84)).requires_grad_()
                loss = variant.function(wide, text, out["scale"], out["bias"], tile=20, exchange=exchange, **further)
                grads = torch.autograd.grad(loss["loss"], (wide, text), retain_graph=True)
            found[name, exchange] = largest.elements, [loss["loss"].detach(), *grads]
    return found


def test_ring_holds_no_gathered_features_and_agrees_with_the_gather() -> None:
    ranks = run_ranks(4, largest_and_gradients)
    own = 40 * 100
    for found, name in product(ranks, TILED):
        gathered, grads = found[name, "gather"]
        passed_on, ring_grads = found[name, "ring"]
        assert gathered >= 4 * own, name
        # what is fixed (the teacher's features, the margins' captions) travels in one block with the captions
        assert passed_on <= (2 if "adaptive" in name else 1.05) * own, name
        assert max(map(relative_error, ring_grads, grads)) < 1e-13, name


def state_of_sogclr(rank: int, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Two steps of a module on the same samples; the second takes up the averages of the first."""
    rows = 12
    n = rows // world
    here = slice(rank * n, (rank + 1) * n)
    # numbers out of order, sample 3 twice (on different ranks, where there are several), the last row not valid
    samples = torch.tensor([19, 3, 7, 5, 2, 11, 3, 0, 8, 14, 1, 6])
    batch = global_batch(rows, torch.float64)
    batch["valid"] = torch.arange(rows) < rows - 1
    batch = of_rows(here, batch)
    loss = WeightedSum([("global", SogCLR(samples=20, gamma=0.6, rho=7.0), 0.5), ("cycle", CyCLIP(), 2.0)])
    for _ in range(2):
        found = step(
            TinyPair(torch.float64), loss, batch["image"], batch["text"], samples=samples[here], valid=batch["valid"]
        )
    return loss.state_dict()["losses.global.log_u"], found


def test_sogclr_keeps_the_same_averages_on_every_rank_and_on_one_process() -> None:
    expected_state, expected = state_of_sogclr(0, 1)
    states, founds = zip(*run_ranks(2, state_of_sogclr), strict=True)
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[0], expected_state, rtol=1e-6, atol=0)
    assert expected_state.isfinite().all(dim=1).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5, 7, 8, 11, 14, 19]
    for key, value in expected.items():  # the averages are float32
        assert relative_error(torch.stack([found[key] for found in founds]).mean(dim=0), value) < 1e-6, key


def unequal(rank: int, world: int) -> str:
    rows = 3 + rank
    try:
        InfoNCE()(torch.eye(rows, 5), torch.eye(rows, 5), torch.tensor(1.0))
    except UserError as error:
        return str(error)
    return "no error"


def test_unequal_local_batches_are_refused_on_every_rank() -> None:
    assert all(message.startswith("local batches of [3, 4] rows") for message in run_ranks(2, unequal))


def wrong_on_rank_1(rank: int, world: int) -> dict[str, str]:
    """What each rank is told where rank 1 alone is given something else."""
    eye, scale, bias = torch.eye(3, 5), torch.tensor(1.0), torch.tensor(-1.0)
    ids, valid = torch.arange(3), torch.ones(3, dtype=torch.bool)
    wrong = {
        "norms": {"image": 2 * eye},
        "ids of another type": {"ids": ids.float()},
        "no ids": {"ids": None},
        "ids of images too": {"ids": torch.stack([ids, ids], dim=1)},
        "no valid": {"valid": None},
        "width": {"image": torch.eye(3, 4), "text": torch.eye(3, 4)},
        "precision": {"image": eye.double()},
        "no tensor": {"text": eye.numpy()},
        "scale": {"scale": torch.tensor(2.0)},
        "the loss's own": {"loss": SigLIP(), "bias": None},
        "samples": {"samples": torch.arange(3) + 3},
        "the teacher's": {"loss": partial(distillation, teacher_image=eye, teacher_text=2 * eye)},
    }
    teachers = partial(distillation, teacher_image=eye, teacher_text=eye)
    losses = {"the loss's own": SigLIP(), "the teacher's": teachers}
    averages = SogCLR(samples=5)
    told = {}
    for name, change in wrong.items():
        arguments: dict[str, Any] = {
            "image": eye,
            "text": eye,
            "scale": scale,
            "bias": bias,
            "ids": ids,
            "valid": valid,
        }
        arguments["loss"] = losses.get(name, InfoNCE())
        if name == "samples":
            arguments |= {"loss": averages, "samples": torch.arange(3)}
        arguments |= change if rank == 1 else {}
        loss = arguments.pop("loss")
        try:
            loss(**arguments)
            told[name] = "no error"
        except UserError as error:
            told[name] = str(error)
    return told


def test_what_one_rank_refuses_ends_all_ranks_alike_with_the_reason_where_it_is_known() -> None:
    first, second = run_ranks(2, wrong_on_rank_1)
    for name in ("norms", "ids of another type", "no tensor", "the loss's own", "the teacher's", "samples"):
        assert first[name] == "ranks [1] of 2 refused their part of the batch; see the error of rank 1", name
    assert second["samples"].startswith("samples from 3 to 5: sogclr knows numbers below 5")
    assert second["norms"].startswith("image features: row 0 has norm 2")
    assert second["ids of another type"].startswith("ids is torch.float32 (3,)")
    assert second["no tensor"].startswith("text is a ndarray")
    assert second["the loss's own"].startswith("siglip needs a bias")
    assert second["the teacher's"].startswith("teacher_text features: row 0 has norm 2")
    for told in (first, second):
        assert told["no ids"].startswith("`ids` is given on ranks [0] of 2 alone")
        assert told["ids of images too"].startswith("`ids` of [1, 2] columns on the ranks")
        assert told["no valid"].startswith("`valid` is given on ranks [0] of 2 alone")
        assert (
            told["width"]
            == "features of 5 x float32, 4 x float32 on the ranks: they must be of one width and precision"
        )
        assert told["scale"].startswith("scales of [1.0, 2.0] on the ranks: the logit scale must be the same")
        assert told["precision"].startswith("features of 5 x float32, 5 x float64 on the ranks")


def second_derivative(rank: int, world: int) -> list[str]:
    told = []
    for loss in (InfoNCE(tile=None), CyCLIP(), InfoNCE(tile=2)):
        image, text = (x.detach().requires_grad_() for x in features(rank, 4, 6))
        try:
            torch.autograd.grad(loss(image, text, torch.tensor(5.0))["loss"], image, create_graph=True)
            told.append("no error")
        except UserError as error:
            told.append(str(error))
    return told


def test_a_second_derivative_over_several_ranks_is_refused_rather_than_wrong() -> None:
    for told in run_ranks(2, second_derivative):
        assert all("has no second derivative" in message for message in told), told


def single_pairs(rank: int, world: int) -> float:
    eye = torch.eye(2)[rank : rank + 1]
    return infonce(eye, eye, torch.tensor(1.0))["loss"].item()


def test_ranks_with_one_pair_each_are_a_batch_of_two() -> None:
    ranks = run_ranks(2, single_pairs)
    assert sum(ranks) / 2 == pytest.approx(infonce(torch.eye(2), torch.eye(2), torch.tensor(1.0))["loss"].item())
