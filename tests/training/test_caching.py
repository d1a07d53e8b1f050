"""A batch in chunks gives the gradient of the whole batch: towers, scale and bias, dropout included."""

import json
from argparse import Namespace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.train import train_one_epoch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from contrastive.errors import UserError
from contrastive.losses import infonce
from contrastive.models import CorpusTokenizer, TimmImageTower, TransformerTextTower, TwoTower, train_tokenizer
from contrastive.pretrain import pretrain
from contrastive.training.caching import cached_backward, check_chunkable
from tests.distributed.spawn import run_ranks
from tests.distributed.test_training import train

BOUNDS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
# other shapes, other kernels, another order of summation: in float32 that alone is 2e-6
WHOLE_BOUNDS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
NO_DROPOUT = ["model.image.kwargs.proj_drop_rate=0.0", "model.text.dropout=0.0"]
RESNET = "model.image={name: resnet18, size: 32, kwargs: {channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}, locked: %s}"


class Towers(TwoTower):
    """`TwoTower`, whose embeddings are always float32, in the precision of its parameters; it counts its calls."""

    calls = 0

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        self.calls += 1
        image = self.image.project(self.image.features(pixels))
        text = self.text.project(self.text.features(tokens))
        scale = self.logit_scale.exp()
        return {"image": F.normalize(image), "text": F.normalize(text), "scale": scale, "bias": self.logit_bias}


def make_towers(dtype: torch.dtype = torch.float32, dropout: float = 0.0, **options) -> Towers:
    torch.manual_seed(0)
    tokenizer = CorpusTokenizer(train_tokenizer(["red square", "open book"] * 3, vocab_size=300), context=6)
    vit = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_drop_rate": dropout}
    image = TimmImageTower("vit_tiny_patch16_224", 16, 32, kwargs=vit | {"proj_drop_rate": dropout})
    text = TransformerTextTower(300, 16, 6, width=32, depth=2, heads=2, dropout=dropout, pad_id=tokenizer.pad_id)
    return Towers(image, text, tokenizer, 16, **{"bias": -1.0, **options}).to(dtype).train()


def make_batch(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    pixels = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return pixels, torch.randint(1, 300, (n, 6), generator=generator)


def sigmoid_loss(out) -> dict[str, Tensor]:
    """SigLIP's loss (arXiv:2303.15343): one that the bias takes part in."""
    logits = out["scale"] * out["image"] @ out["text"].T + (0 if out["bias"] is None else out["bias"])
    return {"loss": -F.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits)}


def masked_infonce(out) -> dict[str, Tensor]:
    """With captions that repeat, within a chunk and across, and rows that could not be read."""
    n = len(out["image"])
    ids, valid = torch.arange(n) % 5, torch.arange(n) % 4 != 1
    return infonce(out["image"], out["text"], out["scale"], out["bias"], ids, valid=valid, same_caption="ignore")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_pass(model: nn.Module, pixels: Tensor, tokens: Tensor, loss=sigmoid_loss, chunk: int | None = None):
    """The oracle: every forward with its graph, one loss, one backward."""
    model.zero_grad()
    chunk = chunk or len(pixels)
    parts = [model(p, t) for p, t in zip(pixels.split(chunk), tokens.split(chunk), strict=True)]
    out = parts[0] | {key: torch.cat([part[key] for part in parts]) for key in ("image", "text")}
    loss(out)["loss"].backward()
    return gradients(model)


def cached(model: nn.Module, pixels: Tensor, tokens: Tensor, loss=sigmoid_loss, chunk: int = 3, **options):
    model.zero_grad()
    cached_backward(model, pixels, tokens, loss, chunk=chunk, **options)
    return gradients(model)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, the norm of the difference beside the norm of the gradient."""
    assert found.keys() == expected.keys() and all(g.norm() > 0 for g in expected.values())
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())


# The gradient


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@BOUNDS
def test_with_dropout_the_gradient_is_that_of_the_same_chunks_with_their_graphs(dtype, bound, checkpointing):
    model, batch = make_towers(dtype, dropout=0.25), make_batch(11, dtype)
    torch.manual_seed(1)
    expected = one_pass(model, *batch, chunk=3)
    if checkpointing:
        model.checkpoint_gradients()
    torch.manual_seed(1)
    found = cached(model, *batch)
    assert {"logit_scale", "logit_bias"} < found.keys()
    assert largest_error(found, expected) <= bound


def test_in_bf16_too():
    model, batch = make_towers(dropout=0.25), make_batch(11)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does

    def loss(out):
        return sigmoid_loss({key: value.float() for key, value in out.items()})

    torch.manual_seed(1)
    expected = one_pass(model, *batch, loss, chunk=3)
    torch.manual_seed(1)
    assert largest_error(cached(model, *batch, loss), expected) <= 1e-6


@pytest.mark.parametrize(("n", "chunk"), [(8, 4), (11, 4), (7, 6), (5, 1)], ids=str)
@WHOLE_BOUNDS
def test_without_dropout_the_gradient_is_that_of_one_pass(dtype, bound, n, chunk):
    model, batch = make_towers(dtype), make_batch(n, dtype)
    expected = one_pass(model, *batch)
    assert largest_error(cached(model, *batch, chunk=chunk), expected) <= bound


@WHOLE_BOUNDS
def test_captions_that_repeat_and_rows_that_are_not_valid_count_over_the_whole_batch(dtype, bound):
    model, batch = make_towers(dtype, bias=None), make_batch(11, dtype)
    expected = one_pass(model, *batch, masked_infonce)
    assert largest_error(cached(model, *batch, masked_infonce), expected) <= bound


@pytest.mark.parametrize("frozen", ["image", "text", "logit_scale", "image text"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    model, batch = make_towers(torch.float64), make_batch(7, torch.float64)
    for name in frozen.split():
        getattr(model, name).requires_grad_(False)
    expected = one_pass(model, *batch)
    found = cached(model, *batch)
    assert not any(name.startswith(tuple(frozen.split())) for name in found)
    assert largest_error(found, expected) <= 1e-12


def test_a_loss_that_leaves_the_scale_out_gives_it_no_gradient():
    found = cached(make_towers(), *make_batch(7), lambda out: {"loss": (out["image"] * out["text"]).sum()})
    assert "image.projection.weight" in found and not {"logit_scale", "logit_bias"} & found.keys()


def test_features_in_place_of_pixels_and_tokens():
    model = make_towers()
    model.forward = lambda *batch: TwoTower.forward(model, *batch)  # which takes features
    batch = torch.randn(7, 32), torch.randn(7, 32)
    assert largest_error(cached(model, *batch), one_pass(model, *batch)) <= 1e-5


def test_gradients_keep_the_factor_of_a_scaler():
    model, batch = make_towers(torch.float64), make_batch(7, torch.float64)
    expected = {name: 1024 * g for name, g in one_pass(model, *batch).items()}
    found = cached(model, *batch, backward=lambda loss: (1024 * loss).backward())
    assert largest_error(found, expected) <= 1e-12


# What it costs and leaves behind


@pytest.mark.parametrize(("n", "chunks"), [(3, 1), (4, 2), (11, 4)])
def test_the_towers_run_twice_less_once_and_the_loss_once(n, chunks):
    model, losses = make_towers(), []
    cached(model, *make_batch(n), lambda out: losses.append(len(out["image"])) or sigmoid_loss(out))
    assert (model.calls, losses) == (2 * chunks - 1, [n])


def test_the_random_state_is_that_of_one_run_through_the_chunks():
    model, batch = make_towers(dropout=0.25), make_batch(11)
    torch.manual_seed(1)
    one_pass(model, *batch, chunk=3)
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cached(model, *batch)
    assert torch.equal(torch.get_rng_state(), expected) and not torch.equal(before, expected)


# What cannot be chunked


def test_batch_statistics_are_refused_by_the_name_of_the_module(make_config):
    with pytest.raises(UserError, match=r"train.chunk: 5 does not go with image.trunk.bn1 .*train.chunk to null"):
        pretrain(make_config(RESNET % "false", "train.chunk=5"), quiet=True)


@pytest.mark.parametrize(
    ("norm", "training"),
    [(BatchNormAct2d(4), True), (EvoNorm2dB0(4), True), (nn.BatchNorm2d(4, track_running_stats=False), False)],
)
def test_so_are_the_relatives_of_batch_normalisation(norm, training):
    with pytest.raises(UserError, match=type(norm).__name__):
        check_chunkable(nn.Sequential(norm).train(training), 8)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4), FrozenBatchNormAct2d(4)])
def test_statistics_of_one_row_and_frozen_ones_are_accepted(norm):
    check_chunkable(nn.Sequential(norm).train(), 8)


def test_a_locked_tower_may_have_batch_statistics(make_config):
    assert pretrain(make_config(RESNET % "true", "train.chunk=5", "train.steps=2"), quiet=True)


# In a run


def losses_of(config) -> list[float]:
    rows = map(json.loads, (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_a_run_in_chunks_has_the_losses_of_the_run_without(make_config, tmp_path):
    plain = make_config(*NO_DROPOUT, f"run.dir={tmp_path}/plain")
    chunked = make_config(*NO_DROPOUT, f"run.dir={tmp_path}/chunked", "train.chunk=5")
    for config in (plain, chunked):
        pretrain(config, quiet=True)
    assert losses_of(chunked) == pytest.approx(losses_of(plain), rel=1e-5)
    assert losses_of(plain)[-1] < losses_of(plain)[0]


def test_a_run_in_chunks_resumes_bit_for_bit(make_config, tmp_path):
    whole = make_config("train.chunk=5", f"run.dir={tmp_path}/whole")
    pretrain(whole, quiet=True)
    parts = make_config("train.chunk=5", f"run.dir={tmp_path}/parts")
    pretrain(parts, stop_after=3, quiet=True)
    pretrain(parts, resume=True, quiet=True)
    found, expected = (load_file(Path(c.run.dir) / "model" / "model.safetensors") for c in (parts, whole))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# Across processes


def two_steps(rank: int, world: int, dtype: torch.dtype, chunk: int) -> tuple[dict[str, Tensor], int]:
    """The gradients of the second of two equal steps, and how often gradients were averaged in both."""
    model = make_towers(dtype)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    calls = []
    wrapped.register_comm_hook(None, lambda state, bucket: calls.append(bucket) or allreduce_hook(None, bucket))
    n = 22
    rows = slice(rank * n // world, (rank + 1) * n // world)
    pixels, tokens = (part[rows] for part in make_batch(n, dtype))
    ids, valid = (torch.arange(n) % 9)[rows], (torch.arange(n) % 4 != 1)[rows]

    def loss(out):
        metrics = infonce(out["image"], out["text"], out["scale"], out["bias"], ids, valid=valid, same_caption="ignore")
        # InfoNCE does not know the bias; a mean over rows averages over ranks as it should
        return {"loss": metrics["loss"] + (out["bias"] * out["image"] * out["text"]).mean()}

    for _ in range(2):
        wrapped.zero_grad()
        cached_backward(wrapped, pixels, tokens, loss, chunk=chunk)
    return gradients(model), len(calls)


@WHOLE_BOUNDS
def test_two_processes_in_chunks_give_the_gradient_of_one_in_one_pass_and_average_once_a_step(dtype, bound):
    expected, _ = run_ranks(1, two_steps, dtype, 22)[0]
    for found, averaged in run_ranks(2, two_steps, dtype, 4):
        assert largest_error(found, expected) <= bound
        assert averaged == 2


def test_a_run_on_two_processes_in_chunks_has_the_losses_of_the_run_on_one_without(corpus, tmp_path):
    one = run_ranks(1, train, corpus, tmp_path / "one", [])[0]
    two = run_ranks(2, train, corpus, tmp_path / "two", ["train.chunk=3"])[0]
    assert two == pytest.approx(one, rel=1e-4)


# Beside open_clip


class Views(nn.Module):
    """An open_clip model with the output of ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        out = self.model(pixels, tokens)
        return {"image": out["image_features"], "text": out["text_features"], "scale": out["logit_scale"], "bias": None}


def accumulate_as_open_clip(model: nn.Module, pixels: Tensor, tokens: Tensor, k: int) -> dict[str, Tensor]:
    """What ``--accum-freq k`` of its trainer leaves as gradients."""
    chunk = len(pixels) // k

    class Loader(list):
        num_batches, num_samples = k, len(pixels)

    loader = Loader(zip(pixels.split(chunk), tokens.split(chunk), strict=True))
    data = {"train": Namespace(set_epoch=lambda epoch: None, dataloader=loader)}
    arguments = Namespace(
        accum_freq=k, batch_size=chunk, device="cpu", precision="fp64", distill=False, skip_scheduler=True,
        horovod=False, grad_clip_norm=None, log_every_n_steps=1, wandb=False, rank=0, world_size=1,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # leaves the weights as they are
    train_one_epoch(model, data, open_clip.ClipLoss(), 0, optimizer, None, None, None, arguments)
    return gradients(model)


@pytest.mark.parametrize("k", [2, 3])
def test_the_scale_gets_its_gradient_once_where_open_clips_accumulation_adds_it_k_times(k):
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 6, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
    theirs = open_clip.CLIP(16, vision, text, output_dict=True).double()
    ours = Views(theirs)
    batch = torch.randn(12, 3, 16, 16).double(), torch.randint(1, 300, (12, 6))

    def loss(out):
        return {"loss": open_clip.ClipLoss()(out["image"], out["text"], out["scale"])}

    expected = one_pass(ours, *batch, loss)
    assert largest_error(cached(ours, *batch, loss, chunk=12 // k), expected) <= 1e-12
    found = {f"model.{name}": gradient for name, gradient in accumulate_as_open_clip(theirs, *batch, k).items()}
    expected["model.logit_scale"] *= k
    assert largest_error(found, expected) <= 1e-12
