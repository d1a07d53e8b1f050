"""A recipe's plan: build the model, count on it, and put the arithmetic of `costs` together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import Tensor

from contrastive.build import build_data, build_duration, build_model, check_batch, wants_training
from contrastive.config import Config, DistillationConfig, MarginConfig, SigLIPConfig, terms_of
from contrastive.errors import UserError
from contrastive.models import TwoTower, train_tokenizer
from contrastive.models.tokenizer import END, PAD
from contrastive.plan import costs, measure
from contrastive.plan.cards import GIB, HERE, Card, find_card
from contrastive.plan.costs import Assumptions, Job, Network
from contrastive.plan.here import measured_card
from contrastive.plan.losses import LossTerm
from contrastive.shards import Mixture
from contrastive.shards.order import local_batch
from contrastive.shards.storage import is_remote
from contrastive.training import check_chunkable

TRAIN_TOKENIZER_UP_TO = 100_000  # captions: some seconds; beyond, its table is taken for full
# Shares of a peak. Of a data sheet: with them the plan agrees with the runs of open_clip that were published with their
# speed (docs/planning.md). Of a peak measured here by one large product and one large copy: more.
UTILISATION, UTILISATION_HERE = 0.3, 0.8
MEMORY_UTILISATION, MEMORY_UTILISATION_HERE = 0.45, 0.8


@dataclass(frozen=True)
class Choices:
    """What the command line says; None is the default of the card, or of the recipe.

    samples: pairs of the training set. tokens: of a caption. price: of an hour of one card. The rest is that of
    `Assumptions`.
    """

    gpus: int = 1
    gpu: str = HERE
    samples: int | None = None
    tokens: int | None = None
    price: float | None = None
    utilisation: float | None = None
    memory_utilisation: float | None = None
    link_utilisation: float = 0.7
    overlap: float = 0.0
    per_node: int = 8
    link: float | None = None
    network: float = 25.0
    reserve: float = 2.0


@dataclass(frozen=True)
class Plan:
    """Everything that `report` shows. Bytes, FLOPs, seconds.

    steps: of the run; None where a run of so many minutes has as many as it can. once: seconds before the first step.
    forward, both: FLOPs a sample. memory: bytes of one card, by part. notes: how a number was come by.
    """

    recipe: str
    card: Card
    precision: str
    assumed: Assumptions
    job: Job
    chunkable: bool
    checkpointing: bool
    tokens: int
    forward: float
    both: float
    memory: dict[str, float]
    step: costs.Step
    steps: int
    once: float
    price: float | None
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run, evaluation and saving left out."""
        return self.once + self.steps * self.step.total

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.card.memory * GIB


def make_plan(config: Config, choices: Choices) -> Plan:
    """The plan of `config`.

    Raises:
        UserError: a choice is out of range, the card cannot compute in the recipe's precision, the global batch does
            not divide by the number of cards, or the number of samples is needed and not known.
    """
    _check(choices)
    rows = local_batch(config.train.global_batch, choices.gpus)
    precision = _precision(config, choices)
    card = measured_card(precision) if choices.gpu.lower() == HERE else find_card(choices.gpu)
    if precision not in card.peak:
        able = ", ".join(f"train.precision={name}" for name in card.peak if name in ("fp16", "fp32"))
        raise UserError(
            f"train.precision: {config.train.precision} is {precision}, which {card.name} lacks; use {able}"
        )
    notes: list[str] = []
    if card.name == HERE and not torch.accelerator.is_available():
        notes.append("on a CPU the seconds were 1.1 to 3 times too short where they were checked (docs/planning.md)")
    data = _data(config, choices)
    samples = len(data) if data is not None else choices.samples
    notes += _not_counted(config)
    model = build_model(config, _tokenizer(config, data, notes)).train()
    tokens = _length(model, choices, notes)
    like_cuda = card.name != HERE or torch.accelerator.is_available()
    network, trunks = _count(model, tokens, precision, like_cuda, cached=config.data.cache == "features")
    terms = tuple(_term(term, network.dim, notes) for term in terms_of(config.loss))
    job = Job(network, terms, rows, choices.gpus, config.train.chunk, samples)
    assumed = _assumptions(choices, card)
    step = costs.step(job, card, precision, assumed)
    once = 0.0
    if trunks:
        if samples is None:
            raise UserError("data.cache: features runs the towers over all samples first; give --samples N")
        notes.append("every process runs the locked towers over the whole data set for itself, in fp32")
        once = samples * sum(
            tower.forward.each / (card.peak["fp32"] * 1e12 * assumed.utilisation)
            + tower.forward_bytes.each / (card.bandwidth * 1e9 * assumed.memory_utilisation)
            for tower in trunks
        )
    forward, both = costs.flops_a_sample(network.towers, costs.passes(rows, config.train.chunk).rows)
    return Plan(
        Path(config.run.dir).name, card, precision, assumed, job, _chunkable(model),
        config.train.gradient_checkpointing, tokens, forward, both, costs.memory_parts(job, assumed.reserve), step,
        _steps(config, data, choices, step.total), once, choices.price, tuple(notes),
    )  # fmt: skip


def _check(choices: Choices) -> None:
    for name in ("gpus", "per_node", "samples", "tokens"):
        value = getattr(choices, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a whole number of at least 1")
    for name in ("utilisation", "memory_utilisation", "link_utilisation"):
        value = getattr(choices, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a share above 0 and up to 1")
    if not 0 <= choices.overlap <= 1:
        raise UserError(f"--overlap {choices.overlap:g}: give a share from 0 to 1")
    for name in ("link", "network"):
        value = getattr(choices, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value:g}: give GB/s above 0")
    for name in ("reserve", "price"):
        value = getattr(choices, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name} {value:g}: give a number of at least 0")


def _assumptions(choices: Choices, card: Card) -> Assumptions:
    measured = card.name == HERE
    return Assumptions(
        choices.utilisation or (UTILISATION_HERE if measured else UTILISATION),
        choices.memory_utilisation or (MEMORY_UTILISATION_HERE if measured else MEMORY_UTILISATION),
        choices.link_utilisation,
        choices.overlap,
        choices.per_node,
        choices.link or card.link,
        choices.network,
        choices.reserve,
    )


def _precision(config: Config, choices: Choices) -> str:
    """As `build_accelerator` chooses, for a card that may not be here."""
    precision = config.train.precision
    if choices.gpu.lower() == HERE and precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("train.precision: fp16 needs an accelerator and there is none here; use bf16 or fp32")
    return "bf16" if precision == "auto" else precision


def _data(config: Config, choices: Choices) -> Mixture | None:
    """The training set, where it lies here and the user does not say how large it is."""
    if choices.samples is None and all(Path(one).exists() or is_remote(one) for one in config.data.train_sets):
        data = build_data(config)
        check_batch(config, data)
        return data
    return None


def _steps(config: Config, data: Mixture | None, choices: Choices, seconds: float) -> int:
    samples = data.epoch_size if data is not None else choices.samples
    if samples is None and config.train.epochs is not None:
        folders = ", ".join(config.data.train_sets)
        raise UserError(
            f"train.epochs: {config.train.epochs:g} epochs need the number of pairs, and data.train ({folders}) does "
            "not exist; give --samples N"
        )
    duration = build_duration(config, samples or 0)
    if duration.steps is not None:
        return duration.steps
    assert duration.minutes is not None
    return max(1, round(60 * duration.minutes / seconds))


def _not_counted(config: Config) -> list[str]:
    """A line for each key of the recipe that would change the numbers, and does not here."""
    image, text = config.model.image, config.model.text
    lines = {
        "train.sharding fsdp: weights, gradients and moments stand here whole; shares are 1/W of them, and send more": (
            config.train.sharding != "none"
        ),
        "patch_dropout and train.curriculum: every step is taken for one of the own size, with all patches": bool(
            image.patch_dropout or config.train.curriculum
        ),
        "optim.ema: four bytes a weight more, on one process": config.optim.ema is not None,
        "unfreeze_at: both towers are taken for learning from the start": bool(image.unfreeze_at or text.unfreeze_at),
    }
    return [f"not counted: {line}" for line, applies in lines.items() if applies]


def _tokenizer(config: Config, data: Mixture | None, notes: list[str]) -> str:
    """The text of a tokenizer for recipes that train one."""
    choice = wants_training(config)
    if choice is None:
        return ""
    if data is not None and len(data) <= TRAIN_TOKENIZER_UP_TO:
        return train_tokenizer(data.captions(), choice.vocab_size, choice.lowercase).to_str()
    notes.append(f"the tokenizer's table is taken for full: {choice.vocab_size:,} rows (model.tokenizer.vocab_size)")
    table = {PAD: 0, END: 1} | {f"token {i}": i for i in range(2, choice.vocab_size)}
    return str(FastTokenizer(models.BPE(table, [])).to_str())


def _length(model: TwoTower, choices: Choices, notes: list[str]) -> int:
    context = model.tokenizer.context
    if not model.text.cuts_text or choices.tokens is None:
        if model.text.cuts_text:
            notes.append(f"captions of {context} tokens, the context; shorter ones cost less (--tokens)")
        return context
    if choices.tokens > context:
        raise UserError(f"--tokens {choices.tokens}: the tokenizer keeps {context} of a caption; give at most that")
    return choices.tokens


def _count(
    model: TwoTower, tokens: int, precision: str, like_cuda: bool, *, cached: bool
) -> tuple[Network, list[costs.Tower]]:
    """The network; and of cached features what gives them, which runs once, before the first step."""
    pixels = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
    # a real token everywhere, the last one the highest: there open_clip's towers look for the end
    text = torch.full((1, tokens), model.tokenizer.vocab_size - 1)
    inputs: dict[str, Tensor] = {"image": pixels, "text": text}
    trunks = []
    if cached:
        features = {"image": model.image_features, "text": model.text_features}
        for name, run in features.items():
            trunks.append(measure.tower(name, getattr(model, name), run, inputs[name], "fp32", like_cuda=like_cuda))
            with torch.no_grad():
                inputs[name] = run(inputs[name]).float()
    encode = {"image": model.encode_image, "text": model.encode_text}
    towers = tuple(
        measure.tower(name, getattr(model, name), encode[name], inputs[name], precision, like_cuda=like_cuda)
        for name in inputs
    )
    inside = sum(tower.learned for tower in towers)
    further = sum(p.numel() for p in model.parameters() if p.requires_grad) - inside
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    size = sum(one.nbytes for one in inputs.values())
    return Network(towers, further, buffers, model.dim, size), trunks


def _term(term: Any, dim: int, notes: list[str]) -> LossTerm:
    options: dict[str, Any] = {"kind": term.kind}
    for name in ("tile", "exchange"):
        if hasattr(term, name):
            options[name] = getattr(term, name)
    match term:
        case SigLIPConfig():
            options["sweeps"] = 1
        case MarginConfig():
            options |= {"sweeps": 1 if term.negatives == "sum" else 2, "fixed": dim if term.adaptive else 0}
        case DistillationConfig():
            options["fixed"] = dim
            notes.append("the teacher's features are taken for as wide as the student's; its pass over the data set, "
                         "before the first step, and its memory are left out")  # fmt: skip
    if term.kind == "custom":
        notes.append("a loss of your own is taken for plain InfoNCE on whole matrices")
    return LossTerm(**options)


def _chunkable(model: TwoTower) -> bool:
    try:
        check_chunkable(model, 1)
    except UserError:
        return False
    return True
