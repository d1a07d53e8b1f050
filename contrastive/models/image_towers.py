"""Image towers. Legend: N images, C = 3, H = W = ``image_size``, F = ``width`` of the features, D = joint ``dim``.

A tower offers ``features(pixels_NCHW) -> (N, F)``, what a probe reads, and ``project(features_NF) -> (N, D)``, what the
loss reads (before normalisation). Pixels arrive normalised with the tower's own ``mean`` and ``std``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

from contrastive.errors import UserError


class ImageTower(Protocol):
    """The interface of an image tower (an ``nn.Module``) that the two-tower model uses.

    A tower whose input is not square has ``full_size`` too, (height, width). `mean` and `std` follow
    `TwoTower.preprocessing`.
    """

    image_size: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def features(self, pixels: Tensor) -> Tensor: ...

    def project(self, features: Tensor) -> Tensor: ...

    def projection_parameters(self) -> list[nn.Parameter]:
        """What still learns when the tower is locked."""
        ...

    def checkpoint_gradients(self) -> None: ...

    def description(self) -> dict[str, Any]:
        """The arguments that build the tower again, weights aside, as JSON."""
        ...


class TimmImageTower(nn.Module):
    """Any timm classifier without its head, and a linear projection to the joint space.

    Args:
        name: a timm model name; `kwargs` go to ``timm.create_model`` (widths, depths, stem …).
        image_size: side of the square input, pixels.
        any_size: make a network that is built for one size take others too: its positions are resampled for them
            (bicubic). Weights and the features of images of `image_size` are the same with it.
        weights: a checkpoint file to start from. Tensors are matched by name or, where no name matches, in order.

    Raises:
        UserError: unknown name or argument, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        image_size: int,
        kwargs: dict[str, Any] | None = None,
        weights: str | Path | None = None,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.image_size, self.kwargs = name, dim, image_size, dict(kwargs or {})
        self.mean, self.std = tuple(mean), tuple(std)
        if not timm.is_model(name):
            near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise UserError(f"model.image.name: timm has no model {name!r}{hint}")
        arguments = dict(self.kwargs)
        # Networks with a fixed input (most transformers) are built for it; the others refuse the argument.
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = image_size
            if any_size:
                arguments["dynamic_img_size"] = True
        try:
            trunk = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            if "dynamic_img_size" in str(error):
                raise UserError(
                    f"train.curriculum: timm's {name} takes images of {image_size} px only; leave the sizes of the "
                    "stages out, or choose another model.image.name"
                ) from None
            raise UserError(f"model.image.kwargs: timm's {name} does not accept {self.kwargs} ({error})") from None
        self.trunk: Any = trunk
        if weights is not None:
            _load_trunk(trunk, Path(weights))
        # Some trunks widen their features behind the pooling, in what timm counts to the head.
        self.width: int = getattr(trunk, "head_hidden_size", None) or trunk.num_features  # type: ignore[assignment]
        self.projection = nn.Linear(self.width, dim, bias=False)

    def features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.trunk(pixels)
        return features

    def project(self, features: Tensor) -> Tensor:
        projected: Tensor = self.projection(features)
        return projected

    def projection_parameters(self) -> list[nn.Parameter]:
        return list(self.projection.parameters())

    def checkpoint_gradients(self) -> None:
        if not hasattr(self.trunk, "set_grad_checkpointing"):
            raise UserError(f"train.gradient_checkpointing: timm's {self.name} does not support it; set it to false")
        self.trunk.set_grad_checkpointing(True)

    def description(self) -> dict[str, Any]:
        return {
            "kind": "timm",
            "name": self.name,
            "dim": self.dim,
            "image_size": self.image_size,
            "kwargs": self.kwargs,
            "mean": self.mean,
            "std": self.std,
        }


def _load_trunk(trunk: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"model.image.weights: {path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        saved: dict[str, Tensor] = load_file(path)
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    saved = saved.get("state_dict", saved)  # type: ignore[assignment]
    wanted = trunk.state_dict()
    if set(wanted) <= set(saved):
        trunk.load_state_dict({key: saved[key] for key in wanted})
        return
    # Another implementation of the same network lists the same tensors under other names, in the same order,
    # with the classifier, which the trunk lacks, at the end.
    values = list(saved.values())[: len(wanted)]
    if len(values) < len(wanted) or any(a.shape != b.shape for a, b in zip(values, wanted.values(), strict=True)):
        raise UserError(f"model.image.weights: {path} does not fit the trunk ({len(wanted)} tensors by name or order)")
    trunk.load_state_dict(dict(zip(wanted, values, strict=True)))
