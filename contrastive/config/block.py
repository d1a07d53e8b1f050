"""What all blocks of a recipe are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

# The kind of a block that does not say one; `reading` needs it to know whether an override changes it.
DEFAULT_KINDS = {
    "model": "pair",
    "model.image": "timm",
    "model.text": "transformer",
    "model.tokenizer": "trained",
    "loss": "infonce",
}


class Block(BaseModel):
    """What all blocks share: unknown keys are errors, `1` is not `true`, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def kind_of(block: str) -> Discriminator:
    """Tells the kinds of a block apart: by its `kind`, or the default."""

    def kind(value: Any) -> str | None:
        if isinstance(value, dict):
            return str(value.get("kind", DEFAULT_KINDS[block]))
        return getattr(value, "kind", None)

    return Discriminator(kind)


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
