from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import SumReducer

from contrastive.errors import UserError
from contrastive.losses import Margin, margin
from tests.losses.dense import features, gradients, margin_dense, relative_error

ONE = torch.tensor(1.0)


def before_normalisation(seed: int) -> tuple[torch.Tensor, ...]:
    """Leaves and their features: the oracle normalises again, and differentiates through that."""
    leaves = [(2 * block).detach().requires_grad_() for block in features(seed, 19, 8)]
    return *leaves, *(F.normalize(leaf, dim=1) for leaf in leaves)


def triplet_loss() -> TripletMarginLoss:
    return TripletMarginLoss(margin=0.2, distance=CosineSimilarity(), reducer=SumReducer())


def test_sum_is_that_of_pytorch_metric_learning_divided_by_the_batch() -> None:
    image_leaf, text_leaf, image, text = before_normalisation(0)
    labels = torch.arange(19)
    # ref_labels as a separate tensor: given the same object, the library drops the diagonal positives
    oracle = sum(
        triplet_loss()(a, labels, ref_emb=b, ref_labels=labels.clone()) for a, b in ((image, text), (text, image))
    )
    loss = margin(image, text, ONE)["loss"]
    assert relative_error(loss * 19, oracle) < 1e-12
    found = gradients(loss * 19, image_leaf, text_leaf)
    expected = gradients(oracle, image_leaf, text_leaf)
    assert max(map(relative_error, found, expected)) < 1e-12


def test_hardest_is_that_of_the_batch_hard_miner_divided_by_the_batch() -> None:
    image_leaf, text_leaf, image, text = before_normalisation(1)
    labels = torch.arange(19)
    oracle = torch.zeros((), dtype=torch.float64)
    for a, b in ((image, text), (text, image)):
        mined = BatchHardMiner(distance=CosineSimilarity())(a, labels, ref_emb=b, ref_labels=labels.clone())
        oracle = oracle + triplet_loss()(a, labels, mined, ref_emb=b, ref_labels=labels.clone())
    loss = margin(image, text, ONE, hardest=True)["loss"]
    assert relative_error(loss * 19, oracle) < 1e-12
    found = gradients(loss * 19, image_leaf, text_leaf)
    expected = gradients(oracle, image_leaf, text_leaf)
    assert max(map(relative_error, found, expected)) < 1e-12


def test_ignoring_equal_captions_is_the_sum_over_the_other_triplets() -> None:
    image, text = features(2, 11, 8)
    ids = torch.tensor([0, 1, 2, 0, 0, 3, 4, 4, 5, 6, 1])
    triplets = [(i, j) for i, j in product(range(11), repeat=2) if ids[i] != ids[j]]
    anchors, negatives = (torch.tensor(column) for column in zip(*triplets, strict=True))
    labels = torch.arange(11)
    oracle = sum(
        triplet_loss()(a, labels, (anchors, anchors, negatives), ref_emb=b, ref_labels=labels.clone())
        for a, b in ((image, text), (text, image))
    )
    loss = margin(image, text, ONE, ids=ids, same_caption="ignore")["loss"]
    assert relative_error(loss * 11, oracle) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    dim=st.integers(1, 6),
    width=st.floats(0, 2),
    hardest=st.booleans(),
    same_caption=st.sampled_from(["negative", "ignore"]),
    data=st.data(),
)
def test_equals_dense_loops_for_any_shape_ids_and_valid_rows(
    seed: int, rows: int, dim: int, width: float, hardest: bool, same_caption: str, data: st.DataObject
) -> None:
    image, text = features(seed, rows, dim)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    options = {"margin": width, "hardest": hardest, "same_caption": same_caption}
    loss = margin(image, text, ONE, ids=ids, valid=valid, **options)["loss"]
    oracle = margin_dense(image, text, ids, valid, **options)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("hardest", [False, True])
def test_gradients_equal_dense_loops(hardest: bool) -> None:
    image, text = features(3, 12, 6)
    ids = torch.tensor([0, 1, 2, 0, 0, 3, 4, 4, 5, 6, 1, 7])
    valid = torch.arange(12) % 5 != 2
    options = {"margin": 0.3, "hardest": hardest, "same_caption": "ignore"}
    loss = margin(image, text, ONE, ids=ids, valid=valid, **options)["loss"]
    oracle = margin_dense(image, text, ids, valid, **options)
    found, expected = gradients(loss, image, text), gradients(oracle, image, text)
    assert max(map(relative_error, found, expected)) < 1e-12
    assert not found[0][~valid].any()


def test_no_term_is_left_when_every_pair_keeps_the_margin() -> None:
    eye = torch.eye(4)
    found = margin(eye, eye, ONE)
    assert (found["loss"], found["accuracy"], found["active"]) == (0, 1, 0)


def test_swapped_captions_are_wrong_and_active() -> None:
    eye = torch.eye(4)
    found = margin(eye, eye[[0, 1, 3, 2]], ONE)
    assert (found["accuracy"], found["active"]) == (0.5, 0.5)


def test_single_pair_has_zero_loss_and_gradient() -> None:
    image, text = features(4, 1, 3)
    for hardest in (False, True):
        loss = margin(image, text, ONE, hardest=hardest)["loss"]
        assert loss == 0
        assert not any(grad.any() for grad in gradients(loss, image, text))


def test_scale_and_bias_are_in_the_graph_with_zero_gradient() -> None:
    image, text = features(5, 4, 3)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    loss = margin(image, text, scale, bias)["loss"]
    assert torch.autograd.grad(loss, (scale, bias)) == (0, 0)  # would raise if they were not used


def test_similarities_stay_float32_under_autocast() -> None:
    image, text = features(6, 16, 8, torch.float32)
    plain = margin(image, text, ONE)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert margin(image, text, ONE)["loss"] == plain


def test_module_binds_the_options() -> None:
    image, text = features(7, 6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    expected = margin(image, text, ONE, ids=ids, margin=0.5, hardest=True, same_caption="ignore")
    assert Margin(margin=0.5, hardest=True, same_caption="ignore")(image, text, ONE, ids=ids) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin -0.1"),
        ({"margin": float("nan")}, "margin nan"),
        ({"same_caption": "ignore"}, "pass `ids`, or use 'negative'"),
        ({"same_caption": "positive"}, "choose one of negative, ignore"),
    ],
)
def test_option_that_does_not_fit_is_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        margin(torch.zeros(4, 5), torch.zeros(4, 5), ONE, **options)
