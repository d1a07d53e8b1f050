"""Text through a causal tower with every shared beginning computed once, and no padding.

In a causal tower a token's state depends on the tokens before it alone. Prompts of one template begin alike ("a bad
photo of a …"), so do names ("golden retriever", "golden eagle"): laid out as a tree of tokens, 80,000 prompts of 9.6
tokens have 4.1 new ones each, where open_clip computes 77. Keys and values of a shared beginning are computed once and
read by everything behind it.

Legend: N texts, L tokens of the longest, T nodes of a tree (tokens that are computed), E = width, H heads of width C,
B blocks of Q = `BLOCK` nodes, P = ancestors of a block's first node, K = P + Q keys that a block can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # nodes that attend together: large enough for matrix products, small beside a tree
NODES = 2048  # nodes of one tree: its largest activation (16 MB in CLIP) stays where malloc reuses it, unlike 4,096


@dataclass(frozen=True)
class Layer:
    """A pre-norm transformer layer, taken apart: what `last_states` needs of it."""

    norm_attention: nn.Module
    qkv_weight: Tensor  # (3E, E): queries, keys, values, each by heads
    qkv_bias: Tensor | None
    out: nn.Module
    norm_mlp: nn.Module
    mlp: nn.Module
    heads: int
    scale_attention: nn.Module = field(default_factory=nn.Identity)  # a gain on what each half adds to the stream
    scale_mlp: nn.Module = field(default_factory=nn.Identity)


@dataclass(frozen=True)
class TokenTree:
    """Texts as a tree of tokens, in depth-first order: a node's ancestors come before it.

    tokens, depth: int64 (T,), of each node, the depth from 0.  paths: int64 (N, L), the nodes of each text, -1 behind
    its end.  ends: int64 (N,), each text's last node.  rows: int64 (N,), which texts of the input these are.
    """

    tokens: NDArray[np.int64]
    depth: NDArray[np.int64]
    paths: NDArray[np.int64]
    ends: NDArray[np.int64]
    rows: NDArray[np.int64]


def token_trees(tokens_NL: NDArray[np.int64], lengths_N: NDArray[np.int64], nodes: int = NODES) -> Iterator[TokenTree]:
    """Trees of about `nodes` nodes that hold every text once; lengths: how many tokens of each row are text (>= 1)."""
    width = int(lengths_N.max(initial=1))
    tokens_NL = np.where(
        np.arange(width) < lengths_N[:, None], tokens_NL[:, :width], -1
    )  # equal padding sorts together
    order = np.lexsort(tokens_NL.T[::-1])
    tokens_NL, lengths_N = tokens_NL[order], lengths_N[order]
    common_N = np.zeros(len(order), np.int64)  # tokens that a text shares with the one before it
    common_N[1:] = np.cumprod(tokens_NL[1:] == tokens_NL[:-1], axis=1).sum(axis=1)
    new_N = np.maximum(lengths_N - common_N, 0)
    start = 0
    while start < len(order):
        # What the first text shares with the tree before is computed again: a handful of nodes.
        total = np.cumsum(new_N[start:]) + lengths_N[start] - new_N[start]
        stop = start + max(1, int(np.searchsorted(total, nodes, side="right")))
        yield _tree(tokens_NL[start:stop], lengths_N[start:stop], common_N[start:stop], order[start:stop])
        start = stop


def _tree(
    tokens_NL: NDArray[np.int64], lengths_N: NDArray[np.int64], common_N: NDArray[np.int64], rows: NDArray[np.int64]
) -> TokenTree:
    positions = np.arange(tokens_NL.shape[1])
    common_N = np.concatenate([[0], common_N[1:]])
    new_NL = (positions >= common_N[:, None]) & (positions < lengths_N[:, None])
    numbers_NL = np.where(new_NL, np.cumsum(new_NL).reshape(new_NL.shape) - 1, -1)
    # A shared token's node is the one that the nearest text before has at that place.
    paths_NL = np.where(positions < lengths_N[:, None], np.maximum.accumulate(numbers_NL, axis=0), -1)
    return TokenTree(
        tokens=tokens_NL[new_NL],
        depth=np.broadcast_to(positions, new_NL.shape)[new_NL],
        paths=paths_NL,
        ends=paths_NL[np.arange(len(rows)), lengths_N - 1],
        rows=rows,
    )


def attention_blocks(tree: TokenTree) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The nodes that each block of `BLOCK` nodes can see besides its own, (B, P), and the mask (B, Q, P + Q).

    In depth-first order a node before the block that is an ancestor of any of its nodes is an ancestor of its first
    one. So a block's keys are its own and one path: everything has one shape, and nothing is padded but the last block.
    """
    total = len(tree.tokens)
    blocks = -(-total // BLOCK)
    # ancestors_TL: the path to each node, itself included, -1 behind it
    ancestors_TL = np.full((total, tree.paths.shape[1]), -1, np.int64)
    text, place = np.nonzero(tree.paths >= 0)
    node = tree.paths[text, place]
    first = np.unique(node, return_index=True)[1]  # any text through a node has the same path to it
    text, place = text[first], place[first]
    ancestors_TL = np.where(np.arange(tree.paths.shape[1]) <= place[:, None], tree.paths[text], -1)
    starts_B = np.arange(blocks) * BLOCK
    outside_BP = np.where(ancestors_TL[starts_B] < starts_B[:, None], ancestors_TL[starts_B], -1)
    outside_BP = outside_BP[:, : max(1, int((outside_BP >= 0).sum(axis=1).max()))]
    width = outside_BP.shape[1]
    mask = np.zeros((blocks * BLOCK, width + BLOCK), bool)
    rows, places = np.nonzero(ancestors_TL >= 0)
    seen = ancestors_TL[rows, places]
    inside = seen >= starts_B[rows // BLOCK]
    mask[rows[inside], width + seen[inside] - starts_B[rows[inside] // BLOCK]] = True
    mask[rows[~inside], places[~inside]] = True  # the path outside is in the order of depth
    mask[total:, width] = True  # what pads the last block must see something, or it gives NaN
    return np.maximum(outside_BP, 0), mask.reshape(blocks, BLOCK, width + BLOCK)


def last_states(
    tokens_NL: Tensor,
    lengths_N: Tensor,
    embedding_VE: Tensor,
    position_LE: Tensor,
    layers: Sequence[Layer],
    nodes: int = NODES,
) -> Tensor:
    """The stream (N, E) behind the last layer at each text's last token, as a plain causal tower gives it.

    Equal to the plain way but for rounding (1e-6 in float32). Precision is that of the weights, or of autocast.

    Args:
        tokens_NL: int64, one text a row.  lengths_N: how many tokens of each row are text, at least 1.
        embedding_VE, position_LE: of the tower; their sum is what the first layer reads.
        nodes: tokens computed at once; memory grows with it.
    """
    device = tokens_NL.device
    states: Tensor | None = None
    for tree in token_trees(tokens_NL.cpu().numpy(), lengths_N.cpu().numpy(), nodes):
        token_T, depth_T = (torch.as_tensor(part, device=device) for part in (tree.tokens, tree.depth))
        ends_nE = _tree_states(embedding_VE[token_T] + position_LE[depth_T], tree, layers)
        if states is None:
            states = ends_nE.new_empty(len(tokens_NL), ends_nE.shape[1])
        states[torch.as_tensor(tree.rows, device=device)] = ends_nE
    return position_LE.new_empty(0, position_LE.shape[1]) if states is None else states


def _tree_states(stream_TE: Tensor, tree: TokenTree, layers: Sequence[Layer]) -> Tensor:
    """The stream behind the last layer at the end of each text of the tree, (n, E)."""
    width, device = stream_TE.shape[1], stream_TE.device
    outside, mask = attention_blocks(tree)
    blocks = len(outside)
    outside_BP, ends_n = torch.as_tensor(outside, device=device), torch.as_tensor(tree.ends, device=device)
    seen_B1QK = torch.as_tensor(mask, device=device)[:, None]
    bias_B1QK: Tensor | None = None
    stream_TE = F.pad(stream_TE, (0, 0, 0, blocks * BLOCK - len(stream_TE)))  # whole blocks, once
    for number, layer in enumerate(layers):
        qkv_TE = F.linear(layer.norm_attention(stream_TE), layer.qkv_weight, layer.qkv_bias)
        if bias_B1QK is None:  # a mask of bools would be turned into this in every layer
            bias_B1QK = torch.zeros(seen_B1QK.shape, dtype=qkv_TE.dtype, device=device)
            bias_B1QK.masked_fill_(~seen_B1QK, -torch.inf)
        qkv_T3HC = qkv_TE.view(-1, 3, layer.heads, width // layer.heads)
        own_BQ3HC = qkv_T3HC.view(blocks, BLOCK, *qkv_T3HC.shape[1:])
        keys_BHKC, values_BHKC = (
            torch.cat([qkv_T3HC[:, part][outside_BP], own_BQ3HC[:, :, part]], dim=1).transpose(1, 2) for part in (1, 2)
        )
        found_BHQC = F.scaled_dot_product_attention(
            own_BQ3HC[:, :, 0].transpose(1, 2), keys_BHKC, values_BHKC, attn_mask=bias_B1QK
        )
        found_TE = found_BHQC.transpose(1, 2).reshape(blocks * BLOCK, width)
        if number == len(layers) - 1:  # nothing reads the other nodes any more
            found_TE, stream_TE = found_TE[ends_n], stream_TE[ends_n]
        stream_TE = stream_TE + layer.scale_attention(layer.out(found_TE))
        stream_TE = stream_TE + layer.scale_mlp(layer.mlp(layer.norm_mlp(stream_TE)))
    return stream_TE if len(layers) else stream_TE[ends_n]
