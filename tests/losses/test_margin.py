from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import AvgNonZeroReducer, SumReducer
from torch import Tensor

from contrastive.errors import UserError
from contrastive.losses import Margin, margin
from tests.losses.dense import features, gradients, relative_error, scalar, worst_error

ONE = torch.tensor(1.0)
LABELS = torch.arange(19)
ENGINES = [{}, {"tile": 5}, {"tile": None}]


def before_normalisation(seed: int) -> tuple[Tensor, ...]:
    """Leaves and their features: the oracle normalises again, and differentiates through that."""
    leaves = [(2 * block).detach().requires_grad_() for block in features(seed, 19, 8)]
    return *leaves, *(F.normalize(leaf, dim=1) for leaf in leaves)


def triplets(image: Tensor, text: Tensor, miner: object = None, reducer: object = None) -> Tensor:
    """pytorch-metric-learning's triplet loss, added over both directions."""
    loss = TripletMarginLoss(margin=0.2, distance=CosineSimilarity(), reducer=reducer or SumReducer())
    total = torch.zeros((), dtype=image.dtype)
    for a, b in ((image, text), (text, image)):
        # ref_labels as a separate tensor: given the same object, the library drops the diagonal positives
        mined = miner(a, LABELS, ref_emb=b, ref_labels=LABELS.clone()) if miner else None
        total = total + loss(a, LABELS, mined, ref_emb=b, ref_labels=LABELS.clone())
    return total


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_sum_is_that_of_pytorch_metric_learning_divided_by_the_batch(engine: dict) -> None:
    image_leaf, text_leaf, image, text = before_normalisation(0)
    loss, oracle = 19 * margin(image, text, ONE, **engine)["loss"], triplets(image, text)
    found, expected = (gradients(value, image_leaf, text_leaf) for value in (loss, oracle))
    assert worst_error([loss, *found], [oracle, *expected]) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_hardest_is_that_of_the_batch_hard_miner_divided_by_the_batch(engine: dict) -> None:
    image_leaf, text_leaf, image, text = before_normalisation(1)
    loss = 19 * margin(image, text, ONE, negatives="hardest", **engine)["loss"]
    oracle = triplets(image, text, BatchHardMiner(distance=CosineSimilarity()))
    found, expected = (gradients(value, image_leaf, text_leaf) for value in (loss, oracle))
    assert worst_error([loss, *found], [oracle, *expected]) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_semi_hard_is_the_mean_of_what_the_semi_hard_miner_finds(engine: dict) -> None:
    image_leaf, text_leaf, image, text = before_normalisation(2)
    loss = margin(image, text, ONE, negatives="semi-hard", **engine)["loss"]
    miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard", distance=CosineSimilarity())
    oracle = triplets(image, text, miner, AvgNonZeroReducer())
    found, expected = (gradients(value, image_leaf, text_leaf) for value in (loss, oracle))
    assert expected[0].any()
    assert worst_error([loss, *found], [oracle, *expected]) < 1e-12


@pytest.mark.parametrize("tile", [None, "auto", 7, 16, 59])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_semi_hard_takes_no_twin_of_the_partner_whatever_its_rounding(
    dtype: torch.dtype, tile: int | str | None
) -> None:
    # Every caption is there twice: for an image, the twin of its partner is exactly as similar, and so not behind it.
    # Products of other shapes round it to this side or that; images differ, so that the other direction has no ties.
    image, text = (x.detach().clone() for x in features(0, 60, 64))
    text[30:] = text[:30]
    similarity, twin = image @ text.T, (torch.arange(60) + 30) % 60
    own = similarity.diagonal()[:, None]
    oracle = 0.0
    for to_captions, one_way in ((True, similarity), (False, similarity.T)):
        lead = own - one_way
        found = (lead > 0) & (lead < 0.2) & ~torch.eye(60, dtype=torch.bool)
        if to_captions:
            found[torch.arange(60), twin] = False
        oracle += float((0.2 - lead)[found].mean())
    leaves = image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()
    loss = margin(*leaves, ONE, negatives="semi-hard", tile=tile)["loss"]
    assert loss.item() == pytest.approx(oracle, rel=1e-6 if dtype == torch.float32 else 1e-12)


def test_ignoring_equal_captions_is_the_sum_over_the_other_triplets() -> None:
    image, text = features(2, 11, 8)
    ids = torch.tensor([0, 1, 2, 0, 0, 3, 4, 4, 5, 6, 1])
    chosen = [(i, j) for i, j in product(range(11), repeat=2) if ids[i] != ids[j]]
    anchors, negatives = (torch.tensor(column) for column in zip(*chosen, strict=True))
    labels, loss = torch.arange(11), TripletMarginLoss(0.2, distance=CosineSimilarity(), reducer=SumReducer())
    oracle = sum(
        loss(a, labels, (anchors, anchors, negatives), ref_emb=b, ref_labels=labels.clone())
        for a, b in ((image, text), (text, image))
    )
    found = margin(image, text, ONE, ids=ids, same_caption="ignore")["loss"]
    assert relative_error(found * 11, oracle) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_hardness_mixes_the_sum_and_the_hardest(engine: dict) -> None:
    image, text = features(3, 12, 6)
    mixed = margin(image, text, ONE, negatives="hardest", hardness=0.3, **engine)["loss"]
    oracle = 0.7 * margin(image, text, ONE)["loss"] + 0.3 * margin(image, text, ONE, negatives="hardest")["loss"]
    found, expected = gradients(mixed, image, text), gradients(oracle, image, text)
    assert worst_error([mixed, *found], [oracle, *expected]) < 1e-12


@pytest.mark.parametrize("tile", [None, 1, "auto"])
def test_adaptive_margin_of_equal_captions_is_nothing_and_of_unlike_ones_is_whole(tile: int | str | None) -> None:
    # captions 0 and 1 are the same vector, 2 is at right angles; every image is at right angles to every caption
    text = torch.eye(6, dtype=torch.float64)[[0, 0, 1]]
    image = torch.eye(6, dtype=torch.float64)[3:]
    loss = margin(image, text, ONE, margin=0.2, adaptive=1.0, tile=tile)["loss"]
    # of six ordered pairs and two directions, those with caption 2 violate a margin of 0.2; the others have none
    assert loss.item() == pytest.approx(2 * 4 * 0.2 / 3)


def test_no_term_is_left_when_every_pair_keeps_the_margin() -> None:
    eye = torch.eye(4)
    found = margin(eye, eye, ONE)
    assert (found["loss"], found["accuracy"], found["active"]) == (0, 1, 0)


@pytest.mark.parametrize("tile", [None, 1, 3, "auto"])
def test_swapped_captions_are_wrong_and_active(tile: int | str | None) -> None:
    eye = torch.eye(4)
    found = margin(eye, eye[[0, 1, 3, 2]], ONE, tile=tile)
    assert (found["accuracy"], found["active"]) == (0.5, 0.5)


def test_scale_and_bias_have_a_gradient_of_exactly_zero() -> None:
    image, text = features(5, 4, 3)
    scale, bias = scalar(10.0), scalar(-1.0)
    assert torch.autograd.grad(margin(image, text, scale, bias)["loss"], (scale, bias)) == (0, 0)


def test_module_binds_the_options() -> None:
    image, text = features(7, 6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    options = {"margin": 0.5, "negatives": "hardest", "same_caption": "ignore"}
    assert Margin(**options)(image, text, ONE, ids=ids) == margin(image, text, ONE, ids=ids, **options)


def test_warm_up_goes_from_the_sum_to_the_hardest_in_as_many_steps() -> None:
    image, text = features(8, 6, 4)
    warming = Margin(negatives="hardest", warmup_steps=4)
    found = [warming(image, text, ONE)["loss"].item() for _ in range(6)]
    expected = [
        margin(image, text, ONE, negatives="hardest", hardness=hardness)["loss"].item()
        for hardness in (0, 0.25, 0.5, 0.75, 1, 1)
    ]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == pytest.approx(margin(image, text, ONE)["loss"].item(), rel=1e-12)


def test_warm_up_goes_on_from_a_state_dict() -> None:
    image, text = features(8, 6, 4)
    first, second = (Margin(negatives="hardest", warmup_steps=4) for _ in range(2))
    for _ in range(2):
        first(image, text, ONE)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["steps"] == 2
    assert second(image, text, ONE)["loss"] == first(image, text, ONE)["loss"]


def test_evaluation_does_not_count_as_a_step_of_the_warm_up() -> None:
    image, text = features(8, 6, 4)
    warming = Margin(negatives="hardest", warmup_steps=4).eval()
    warming(image, text, ONE)
    assert warming.steps == 0


@pytest.mark.parametrize("options", [{"warmup_steps": 5}, {"warmup_steps": 5, "negatives": "sum"}])
def test_warm_up_without_hardest_negatives_is_refused(options: dict) -> None:
    with pytest.raises(UserError, match="warmup_steps 5: only 'hardest' negatives have a warm-up"):
        Margin(**options)
