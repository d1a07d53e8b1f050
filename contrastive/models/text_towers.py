"""Text towers. Legend: N captions, L tokens (the longest of the call), E = ``width``, D = joint ``dim``.

A tower offers ``features(tokens_NL) -> (N, E)`` and ``project(features_NE) -> (N, D)``, as image towers do, and is not
asked for more; what it returns is not yet normalised. ``cuts_text`` says whether the
result is the same for captions cut to the longest of the batch as for captions padded to the full context; towers for
which it is false are given the full context by the model. A causal tower that pools at a text's last token may also
have ``shares_prefixes`` true and ``prompt_features(tokens_NL) -> (N, E)``: ``features`` for use, in evaluation mode,
with what texts have in common computed once (see `prefix_tree`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from contrastive.errors import UserError
from contrastive.models.prefix_tree import Layer, last_states


class TextTower(Protocol):
    """What the two-tower model needs of a text tower (an ``nn.Module``)."""

    cuts_text: bool

    def features(self, tokens: Tensor) -> Tensor: ...

    def project(self, features: Tensor) -> Tensor: ...

    def projection_parameters(self) -> list[nn.Parameter]:
        """What still learns when the tower is locked."""
        ...

    def checkpoint_gradients(self) -> None: ...

    def description(self) -> dict[str, Any]:
        """The arguments that build the tower again, weights aside, as JSON."""
        ...


def mean_of_real(x_NLE: Tensor, real_NL: Tensor) -> Tensor:
    """Average over the tokens that are no padding, ``(N, E)``; zero where a caption has none."""
    weight_NL1 = real_NL.unsqueeze(-1).to(x_NLE.dtype)
    return (x_NLE * weight_NL1).sum(1) / weight_NL1.sum(1).clamp(min=1)


class Block(nn.Module):
    """Pre-norm transformer block; `mask` is True where attention is allowed, ``(N, 1, L, L)``."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_NLE: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x_NLE.shape
        qkv = self.qkv(self.norm_attention(x_NLE)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        x_NLE = x_NLE + self.drop(self.out(attended.transpose(1, 2).reshape(n, length, width)))
        return x_NLE + self.drop(self.mlp(self.norm_mlp(x_NLE)))

    def taken_apart(self) -> Layer:
        """What computes the block in evaluation mode on a tree of texts."""
        return Layer(self.norm_attention, self.qkv.weight, self.qkv.bias, self.out, self.norm_mlp, self.mlp, self.heads)


class TransformerTextTower(nn.Module):
    """A text transformer of given width and depth; depth 0 averages word embeddings.

    Padding is masked out of attention and pooling, so the cut to the longest caption is exact for every option.

    Args:
        vocab_size, context, pad_id: of the tokenizer.
        width, depth, heads: of the transformer; `dim` is the joint space.
        pool: ``mean`` over real tokens, or ``end``, the last real token (which must be able to see the others).
        causal: a token attends to those before it only.
    """

    cuts_text = True

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        context: int,
        width: int = 256,
        depth: int = 1,
        heads: int = 4,
        pool: str = "mean",
        causal: bool = False,
        dropout: float = 0.0,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.arguments = {
            "vocab_size": vocab_size,
            "dim": dim,
            "context": context,
            "width": width,
            "depth": depth,
            "heads": heads,
            "pool": pool,
            "causal": causal,
            "dropout": dropout,
            "pad_id": pad_id,
        }
        self.pad_id, self.pool, self.causal = pad_id, pool, causal
        self.checkpointing = False
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        # Without blocks, positions would only add the same offset to every average of the same length.
        self.position = nn.Parameter(torch.randn(context, width) * 0.01) if depth else None
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()
        self.projection = nn.Linear(width, dim, bias=False)
        self.drop = nn.Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=0.02 if depth else 0.1)

    def features(self, tokens_NL: Tensor) -> Tensor:
        real_NL = tokens_NL != self.pad_id
        x_NLE = self.embedding(tokens_NL)
        if self.position is not None:
            x_NLE = x_NLE + self.position[: tokens_NL.shape[1]]
        x_NLE = self.drop(x_NLE)
        if len(self.blocks):
            mask = self._mask(real_NL)
            for block in self.blocks:
                if self.checkpointing and self.training:
                    x_NLE = checkpoint(block, x_NLE, mask, use_reentrant=False)
                else:
                    x_NLE = block(x_NLE, mask)
        x_NLE = self.norm(x_NLE)
        if self.pool == "end":
            last_N = real_NL.sum(1).clamp(min=1) - 1
            return x_NLE[torch.arange(len(x_NLE), device=x_NLE.device), last_N]
        return mean_of_real(x_NLE, real_NL)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a text's features depend on its last token's state, and that on earlier tokens, alone."""
        return self.causal and self.pool == "end" and self.position is not None

    def prompt_features(self, tokens_NL: Tensor) -> Tensor:
        """`features` in evaluation mode, to 1e-5, shared beginnings computed once; only where `shares_prefixes`."""
        real_NL = tokens_NL != self.pad_id
        if not torch.equal(real_NL, real_NL.cummin(dim=1).values):  # padding inside a text is masked as a key
            return self.features(tokens_NL)
        assert self.position is not None
        layers = [block.taken_apart() for block in self.blocks]  # type: ignore[operator]
        lengths_N = real_NL.sum(1).clamp(min=1)
        states: Tensor = self.norm(last_states(tokens_NL, lengths_N, self.embedding.weight, self.position, layers))
        return states

    def project(self, features_NE: Tensor) -> Tensor:
        projected: Tensor = self.projection(features_NE)
        return projected

    def _mask(self, real_NL: Tensor) -> Tensor:
        length = real_NL.shape[1]
        mask = real_NL[:, None, None, :].expand(-1, 1, length, -1)
        if self.causal:
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=real_NL.device).tril()
        # A row of padding alone would attend to nothing and give NaN: let every token see itself.
        return mask | torch.eye(length, dtype=torch.bool, device=real_NL.device)

    def projection_parameters(self) -> list[nn.Parameter]:
        return list(self.projection.parameters())

    def checkpoint_gradients(self) -> None:
        self.checkpointing = True

    def description(self) -> dict[str, Any]:
        return {"kind": "transformer", **self.arguments}


class HuggingFaceTextTower(nn.Module):
    """An encoder from a local Hugging Face folder (never the hub), pooled, and a projection to the joint space.

    Args:
        config: a folder with ``config.json`` (and weights, which are then loaded), or the configuration itself
            as a dict, which gives an untrained encoder (`contrastive.load` fills it from the model folder).
        pool: ``mean`` over real tokens (sentence encoders), or ``cls``, the first token.

    Raises:
        UserError: transformers is missing, or the folder holds no model.
    """

    cuts_text = True  # the attention mask hides padding, positions count from the left

    def __init__(self, config: str | Path | dict[str, Any], dim: int, pool: str = "mean", pad_id: int = 0) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel
            from transformers.utils.logging import disable_progress_bar
        except ImportError:
            raise UserError(
                "model.text.kind huggingface needs transformers; `pip install contrastive[pretrained]`"
            ) from None
        if isinstance(config, dict):
            options = {key: value for key, value in config.items() if key != "model_type"}
            self.encoder = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **options))
        else:
            if not (Path(config) / "config.json").is_file():
                raise UserError(f"model.text.path: {config} is no Hugging Face model folder (no config.json)")
            disable_progress_bar()  # one bar per tensor file says nothing to whoever trains
            self.encoder = AutoModel.from_pretrained(str(config), local_files_only=True)
        self.pool, self.pad_id, self.dim = pool, pad_id, dim
        self.projection = nn.Linear(self.encoder.config.hidden_size, dim, bias=False)
        # BERT's own pooler is not read, and a parameter without a gradient stops distributed training.
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None

    def features(self, tokens_NL: Tensor) -> Tensor:
        real_NL = tokens_NL != self.pad_id
        hidden_NLE: Tensor = self.encoder(input_ids=tokens_NL, attention_mask=real_NL.long()).last_hidden_state
        return hidden_NLE[:, 0] if self.pool == "cls" else mean_of_real(hidden_NLE, real_NL)

    def project(self, features_NE: Tensor) -> Tensor:
        projected: Tensor = self.projection(features_NE)
        return projected

    def projection_parameters(self) -> list[nn.Parameter]:
        return list(self.projection.parameters())

    def checkpoint_gradients(self) -> None:
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def description(self) -> dict[str, Any]:
        config = self.encoder.config
        # the version that wrote it says nothing of the network, and would tell equal models apart
        kept = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        return {
            "kind": "huggingface",
            "config": {**kept, "model_type": config.model_type},
            "dim": self.dim,
            "pool": self.pool,
            "pad_id": self.pad_id,
        }
