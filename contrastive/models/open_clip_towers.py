"""open_clip models behind this project's tower interfaces.

Two things differ from calling open_clip itself. Text is cut to the longest caption where that is exact: open_clip's
``encode_text`` adds the whole positional table and so refuses a shorter input; the towers here slice it. And the image
tower gives the features before its projection, which is what probes want.
"""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer, text_global_pool
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.func import functional_call

from contrastive.errors import UserError
from contrastive.models.prefix_tree import Layer, last_states
from contrastive.models.tokenizer import OpenClipTokenizer
from contrastive.models.two_tower import TwoTower
from contrastive.preprocessing import Preprocessing
from contrastive.wording import first_few, one_line


class OpenClipImageTower(nn.Module):
    """The ``visual`` of an open_clip model, whose pixels are normalised with the mean and std of `preprocessing`."""

    def __init__(self, visual: Any, dim: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.visual = visual
        self.full_size = preprocessing.size
        self.image_size: int = preprocessing.size[0]
        self.mean, self.std = preprocessing.mean, preprocessing.std
        # Only the plain vision transformer keeps its projection where it can be held back.
        self.splits = isinstance(visual, VisionTransformer) and getattr(visual, "proj", None) is not None
        self.width: int = visual.proj.shape[0] if self.splits else dim
        if self.splits:
            self.projection = visual.proj
            visual.proj = None

    def features(self, pixels: Tensor) -> Tensor:
        if isinstance(self.visual, VisionTransformer) and tuple(pixels.shape[2:]) != self.full_size:
            return self._features_of_another_size(pixels)
        features: Tensor = self.visual(pixels)
        return features

    def _features_of_another_size(self, pixels: Tensor) -> Tensor:
        """With the table of positions resampled (bicubic) to the grid of these images; it learns through that."""
        visual, (patch_height, patch_width) = self.visual, self.visual.patch_size
        height, width = pixels.shape[2:]
        if height % patch_height or width % patch_width:  # the convolution would leave the rest of the image out
            raise ValueError(f"{height} x {width} px do not divide by patches of {patch_height} x {patch_width}")
        grid = [height // patch_height, width // patch_width]
        table = visual.positional_embedding
        resampled = resample_abs_pos_embed(table[None], grid, list(visual.grid_size), num_prefix_tokens=1)[0]
        features: Tensor = functional_call(visual, {"positional_embedding": resampled}, (pixels,))
        return features

    def project(self, features: Tensor) -> Tensor:
        return features @ self.projection if self.splits else features

    def projection_parameters(self) -> list[nn.Parameter]:
        return [self.projection] if self.splits else _named_projection(self.visual)

    def checkpoint_gradients(self) -> None:
        self.visual.set_grad_checkpointing(True)

    def description(self) -> dict[str, Any]:
        return {"kind": "open_clip"}


class OpenClipTextTower(nn.Module):
    """The text half of an open_clip model, with input cut short where the architecture makes that exact.

    That is so for a causal tower that pools at the end-of-text token: no token sees those behind it. It is not so for
    bidirectional, last-token or class-token towers, nor for wrapped Hugging Face encoders: they get the full context.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.cuts_text = (
            isinstance(model, TextTransformer)
            and model.pool_type == "argmax"
            and model.attn_mask is not None
            and model.cls_emb is None
        )

    def features(self, tokens_NL: Tensor) -> Tensor:
        """Of towers whose text is cut, the features before the projection; of the others, behind it."""
        if not self.cuts_text:
            output = self.model(tokens_NL)
            whole: Tensor = output[0] if isinstance(output, tuple) else output
            return whole
        model, length = self.model, tokens_NL.shape[1]
        x_NLE = model.token_embedding(tokens_NL) + model.positional_embedding[:length]
        x_NLE = model.transformer(x_NLE, attn_mask=model.attn_mask[:length, :length])
        pooled: Tensor = text_global_pool(model.ln_final(x_NLE), tokens_NL, "argmax")
        return pooled

    @property
    def shares_prefixes(self) -> bool:
        """True of a tower whose text is cut and whose layers are CLIP's own: no norms inside, nothing quantised."""
        return self.cuts_text and all(_plain_block(block) for block in self.model.transformer.resblocks)

    def prompt_features(self, tokens_NL: Tensor) -> Tensor:
        """`features` to 1e-5, shared beginnings computed once; only where `shares_prefixes`."""
        model = self.model
        layers = [
            Layer(
                block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj,
                block.ln_2, block.mlp, block.attn.num_heads, block.ls_1, block.ls_2,
            )
            for block in model.transformer.resblocks
        ]  # fmt: skip
        # open_clip pools at the highest id, which is the end of the text
        lengths_N, embedding_VE = tokens_NL.argmax(dim=-1) + 1, model.token_embedding.weight
        states: Tensor = model.ln_final(
            last_states(tokens_NL, lengths_N, embedding_VE, model.positional_embedding, layers)
        )
        return states

    def project(self, features_NE: Tensor) -> Tensor:
        if not self.cuts_text or self.model.text_projection is None:
            return features_NE
        if isinstance(self.model.text_projection, nn.Linear):
            projected: Tensor = self.model.text_projection(features_NE)
            return projected
        return features_NE @ self.model.text_projection

    def projection_parameters(self) -> list[nn.Parameter]:
        return _named_projection(self.model)

    def checkpoint_gradients(self) -> None:
        self.model.transformer.grad_checkpointing = True

    def description(self) -> dict[str, Any]:
        return {"kind": "open_clip"}


def _plain_block(block: Any) -> bool:
    return (
        type(block) is ResidualAttentionBlock
        and not hasattr(block, "ln_1_kv")
        and block.attn.in_proj_weight is not None
        and block.attn.bias_k is None
        and not block.attn.add_zero_attn
        and type(block.mlp.c_fc) is nn.Linear
    )


def _named_projection(tower: nn.Module) -> list[nn.Parameter]:
    """The last linear map of an open_clip tower; open_clip has these names for it."""
    names = ("proj", "text_projection", "head", "attnpool.c_proj")
    return [parameter for key, parameter in tower.named_parameters() if key.startswith(names)]


def _unknown_tag(name: str, pretrained: str | None) -> str | None:
    """The reason where `pretrained` is neither a tag of the model nor a file, with the tags nearest to it."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained or pretrained in tags or Path(pretrained).exists():
        return None
    if not tags:
        return "no such file, and open_clip has no weights for this model"
    near = difflib.get_close_matches(pretrained, tags, n=5)
    which = f"did you mean {', '.join(near)}?" if near else f"its tags are {first_few(tags)}"
    return f"no such tag or file; {which}"


def open_clip_model(
    name: str, *, pretrained: str | None = None, config: dict[str, Any] | None = None, **options: Any
) -> TwoTower:
    """A `TwoTower` around the open_clip model `name` (or a path to a model JSON).

    Its preprocessing is the one that open_clip has for the tag. It is open_clip's default for a checkpoint file and for
    random weights, unless the JSON is an ``open_clip_config.json``, which has its own.

    Args:
        pretrained: an open_clip weight tag or a checkpoint file; None gives random weights. A tag may need the hub.
        config: the model's JSON as a dict, instead of looking `name` up.
        options: keyword arguments of `TwoTower` (scale, bias, locks).

    Raises:
        UserError: the name is unknown, the JSON is broken, or the weights cannot be had.
    """
    path = Path(name)
    named: dict[str, Any] = {}
    if config is None and path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"model.name: {path} does not exist")
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"model.name: {path} is not JSON ({error})") from None
        name = path.stem
        if "model_cfg" in config:  # an open_clip_config.json, as open_clip saves with weights
            named, config = config.get("preprocess_cfg") or {}, config["model_cfg"]
    known = open_clip.get_model_config(name)
    if config is None:
        if known is None:
            near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"model {name!r}: open_clip has none of that name{hint}")
        config = known
    if known is not None and known == config:
        registered = name
    else:
        # open_clip builds by registered name only; its registry takes files, so ours goes through one.
        with tempfile.TemporaryDirectory() as folder:
            registered = f"{name}-custom"
            (Path(folder) / f"{registered}.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder)
    # open_clip warns of random weights on the root logger; whoever asked for none knows, and `load` says it itself.
    # It also logs its errors before it raises them: they are in the one line below.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        model = open_clip.create_model(
            registered,
            pretrained=pretrained,
            require_pretrained=pretrained is not None,
            pretrained_text=False,
            force_custom_text=True,  # one layout for all: the text tower is a module of its own
        )
    except Exception as error:  # hub, file and architecture faults come as many types
        what = f"the weights {pretrained!r} of {name}" if pretrained else name
        reason = _unknown_tag(name, pretrained) or one_line(error)
        raise UserError(f"model: {what} cannot be opened here ({reason})") from None
    finally:
        logging.disable(before)
    dim = int(config["embed_dim"])
    visual = model.visual
    # open_clip saves the tag's configuration there; a file of weights has none, and gets open_clip's defaults
    preprocessing = Preprocessing.of_open_clip({**visual.preprocess_cfg, **named, "size": visual.image_size})
    text_config = config.get("text_cfg", {})
    context = int(text_config.get("context_length", 77))
    own = bool(text_config.get("hf_tokenizer_name") or text_config.get("tokenizer_kwargs"))
    tokenizer = OpenClipTokenizer(registered if own else None, context)
    if pretrained is not None:
        # The weights' own scale is part of them; a learned value must not be reset to the recipe's start.
        options = {**options, "scale_init": float(model.logit_scale.detach().exp())}
        if getattr(model, "logit_bias", None) is not None:
            options["bias"] = float(model.logit_bias.detach())
    tower = TwoTower(
        OpenClipImageTower(visual, dim, preprocessing),
        OpenClipTextTower(model.text),
        tokenizer,
        dim,
        name=name,
        preprocessing=preprocessing,
        **options,
    )
    tower.open_clip_config = config
    return tower
