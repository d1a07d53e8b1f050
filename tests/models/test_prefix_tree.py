"""Shared beginnings computed once give what the plain way gives."""

import json

import numpy as np
import open_clip
import pytest
import torch

from contrastive.models import TransformerTextTower, open_clip_model
from contrastive.models.prefix_tree import attention_blocks, token_trees
from tests.models.test_open_clip_towers import TINY

NAMES = ["dog", "golden retriever", "golden eagle", "great white shark", "a", "dog"]
PROMPTS = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES[:30] for name in NAMES]


def tiny_open_clip(tmp_path, **text):
    config = {**TINY, "custom_text": True, "text_cfg": {**TINY["text_cfg"], **text}}
    path = tmp_path / "tiny-tree.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip_model(str(path)).eval()
    for (
        parameter
    ) in model.text.parameters():  # biases and norms start at 0 and 1, which would hide that one is left out
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def tower(**options):
    torch.manual_seed(0)
    return TransformerTextTower(50, 8, 12, width=16, depth=3, heads=2, causal=True, pool="end", **options).eval()


def random_texts(n=300, context=12, ids=5):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 1 + ids, (n, context), generator=generator)
    lengths = torch.randint(1, context + 1, (n, 1), generator=generator)
    return torch.where(torch.arange(context) < lengths, tokens, 0), lengths[:, 0]


@pytest.mark.parametrize("text", [{}, {"ls_init_value": 0.3}])
@torch.no_grad()
def test_open_clips_tower_gives_the_plain_embeddings(tmp_path, text):
    model = tiny_open_clip(tmp_path, **text)
    tokens = model.tokenize(PROMPTS)
    assert model.shares_prefixes
    torch.testing.assert_close(model.encode_prompts(tokens), model.encode_text(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_our_causal_tower_gives_the_plain_features():
    ours, (tokens, _) = tower(), random_texts()
    assert ours.shares_prefixes
    torch.testing.assert_close(ours.prompt_features(tokens), ours.features(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_bfloat16_stays_near_float32(tmp_path):
    model = tiny_open_clip(tmp_path)
    tokens = model.tokenize(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model.encode_prompts(tokens)
    assert (rough * model.encode_text(tokens)).sum(1).min() > 0.9999


@torch.no_grad()
def test_padding_inside_a_text_and_texts_of_nothing_are_right():
    ours = tower()
    for tokens in ([[3, 0, 4, 0], [3, 0, 0, 0]], [[0, 0], [2, 3]]):
        tokens = torch.tensor(tokens)
        torch.testing.assert_close(ours.prompt_features(tokens), ours.features(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"causal": False}, {"pool": "mean"}, {"depth": 0}])
def test_towers_in_which_a_beginning_is_not_shared_take_the_plain_way(options):
    options = {"causal": True, "pool": "end", "depth": 1, "width": 16, "heads": 2} | options
    assert not TransformerTextTower(50, 8, 12, **options).shares_prefixes


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}, {"qk_norm": True}]
)
def test_towers_of_open_clip_that_are_not_clips_take_the_plain_way(tmp_path, text):
    assert not tiny_open_clip(tmp_path, **text).shares_prefixes


@pytest.mark.parametrize("nodes", [1, 40, 10**6])
def test_trees_hold_every_text_once_and_no_beginning_twice(nodes):
    tokens, lengths = (part.numpy() for part in random_texts())
    rows = []
    for tree in token_trees(tokens, lengths, nodes):
        beginnings = []
        for row, path, end in zip(tree.rows, tree.paths, tree.ends, strict=True):
            rows.append(row)
            path = path[path >= 0]
            assert tree.tokens[path].tolist() == tokens[row, : lengths[row]].tolist() and path[-1] == end
            assert tree.depth[path].tolist() == list(range(len(path)))
            beginnings += [tuple(tokens[row, : k + 1]) for k in range(lengths[row])]
        assert len(tree.tokens) == len(set(beginnings))
        assert len(tree.tokens) <= max(nodes, lengths.max())
    assert sorted(rows) == list(range(len(tokens)))


def test_a_node_sees_its_ancestors_and_itself_alone():
    tokens, lengths = (part.numpy() for part in random_texts())
    (tree,) = token_trees(tokens, lengths, 10**6)
    outside, mask = attention_blocks(tree)
    block = mask.shape[1]
    ancestors = {}
    for path in tree.paths:
        path = path[path >= 0].tolist()
        for place, node in enumerate(path):
            ancestors[node] = path[: place + 1]
    assert len(outside) > 2  # several blocks, or nothing is outside
    for node, expected in ancestors.items():
        number, place = divmod(node, block)
        keys = np.concatenate([outside[number], np.arange(number * block, (number + 1) * block)])
        assert sorted(keys[mask[number, place]]) == expected
