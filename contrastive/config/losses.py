"""The losses of a recipe: one block, or a list of blocks whose weighted values are added up."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag
from pydantic_core import PydanticCustomError

from contrastive.config.block import Block, PathText, Positive, Share, kind_of


def _tile(value: Any) -> int | str | None:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    text = "expected auto, null (no tiles: whole matrices) or the side of a tile, a whole number of at least 1"
    raise PydanticCustomError("tile", "{text}", {"text": text})


class LossTermConfig(Block):
    """What every loss of a recipe has."""

    weight: Positive = Field(1.0, description="in a list of losses")


class TiledLossConfig(LossTermConfig):
    """How the matrix of all pairs is gone over; the result is the same."""

    tile: Annotated[int | str | None, PlainValidator(_tile)] = Field(
        "auto", description="side of the tiles of logits; null: whole matrices, with second derivatives"
    )
    exchange: Literal["auto", "gather", "ring"] = Field(
        "auto", description="how processes see each other's captions: all at once, or a block at a time"
    )
    check: bool | None = Field(None, description="look at norms and scale in every step; null: on a CPU only")


class InfoNCEConfig(TiledLossConfig):
    """Cross-entropy of the right partner among the batch, both ways."""

    kind: Literal["infonce"] = "infonce"
    same_caption: Literal["negative", "ignore", "positive"] = Field(
        "ignore", description="what equal captions count as"
    )
    label_smoothing: float = Field(0.0, ge=0, le=0.999)


class DCLConfig(TiledLossConfig):
    """InfoNCE without the partner in its own denominator, for small batches."""

    kind: Literal["dcl"] = "dcl"
    same_caption: Literal["negative", "ignore"] = Field("ignore", description="what equal captions count as")


class SigLIPConfig(TiledLossConfig):
    """A yes-or-no question for each pair; needs model.logit_bias."""

    kind: Literal["siglip"] = "siglip"
    same_caption: Literal["negative", "ignore", "positive"] = Field(
        "ignore", description="what equal captions count as"
    )


class MarginConfig(TiledLossConfig):
    """Hinge on the similarities: the sum over the negatives, the hardest one (VSE++), or the semi-hard ones."""

    kind: Literal["margin"] = "margin"
    margin: float = Field(0.2, gt=0, le=2, description="by which the right partner must lead")
    negatives: Literal["sum", "hardest", "semi-hard"] = Field("sum", description="which of them count")
    warmup_steps: int = Field(0, ge=0, description="of hardest: steps in which it takes the place of the sum")
    adaptive: Share = Field(0.0, description="how much a margin shrinks between captions that are alike")
    same_caption: Literal["negative", "ignore"] = Field("ignore", description="what equal captions count as")


class SogCLRConfig(TiledLossConfig):
    """Denominators as moving averages per sample: small batches act like large ones (with rho: FastCLIP)."""

    kind: Literal["sogclr"] = "sogclr"
    gamma: float = Field(0.9, gt=0, le=1, description="how much of an average a visit replaces")
    epsilon: Positive = Field(1e-14, description="added to the averages")
    rho: float | None = Field(None, description="holds up a temperature that is learned; null: the scale stays")
    same_caption: Literal["negative", "ignore"] = Field("ignore", description="what equal captions count as")


class DistillationConfig(TiledLossConfig):
    """The similarities should be distributed as a teacher's."""

    kind: Literal["distillation"] = "distillation"
    teacher: PathText = Field(min_length=1, description="a run folder, a model folder or an open_clip name")
    teacher_scale: Positive | None = Field(None, description="null: the teacher's own logit scale")


class CyCLIPConfig(LossTermConfig):
    """A regulariser to add to another loss: similarities consistent within and across modalities."""

    kind: Literal["cyclip"] = "cyclip"
    in_modal: float = Field(0.25, ge=0, description="weight of image-image against text-text similarities")
    cross_modal: float = Field(0.25, ge=0, description="weight of image-text against text-image similarities")
    check: bool | None = Field(None, description="look at norms in every step; null: on a CPU only")


class CustomLossConfig(LossTermConfig):
    """A loss of your own."""

    kind: Literal["custom"] = "custom"
    path: str = Field(min_length=1, description="its import path, as in my_package.losses:MyLoss")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")


LossTerm = Annotated[
    Annotated[InfoNCEConfig, Tag("infonce")]
    | Annotated[DCLConfig, Tag("dcl")]
    | Annotated[SigLIPConfig, Tag("siglip")]
    | Annotated[MarginConfig, Tag("margin")]
    | Annotated[SogCLRConfig, Tag("sogclr")]
    | Annotated[DistillationConfig, Tag("distillation")]
    | Annotated[CyCLIPConfig, Tag("cyclip")]
    | Annotated[CustomLossConfig, Tag("custom")],
    kind_of("loss"),
]
# One loss or several. The tags tell them apart for pydantic, and show in the places of its errors.
ONE, LIST = "one", "list"
LossConfig = Annotated[
    Annotated[LossTerm, Tag(ONE)] | Annotated[tuple[LossTerm, ...], Field(strict=False, min_length=1), Tag(LIST)],
    Discriminator(lambda value: LIST if isinstance(value, (list, tuple)) else ONE),
]


def terms_of(loss: Any) -> tuple[Any, ...]:
    """The losses of a recipe's `loss`, which is one block or a list of them."""
    return loss if isinstance(loss, tuple) else (loss,)
