import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.losses import InfoNCE, infonce
from tests.losses.dense import features, gradients, relative_error, scalar, worst_error

SCALE = 14.3
ENGINES = [{}, {"tile": 5}, {"tile": None}]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_open_clip_with_gradients(dtype: torch.dtype, tolerance: float, engine: dict) -> None:
    image, text = features(0, 37, 16, dtype)
    scale, bias = scalar(SCALE, dtype), scalar(-3.0, dtype)
    oracle = open_clip.ClipLoss()(image, text, scale, bias)
    loss = infonce(image, text, scale, bias, **engine)["loss"]
    assert relative_error(loss, oracle) < tolerance
    *found, found_bias = gradients(loss, image, text, scale, bias)
    *expected, expected_bias = gradients(oracle, image, text, scale, bias)
    assert worst_error(found, expected) < tolerance
    # a bias common to all logits cancels: the peer's gradient for it is rounding, ours is exactly zero
    assert found_bias == 0
    assert abs(expected_bias) < tolerance


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_label_smoothing_equals_torch_cross_entropy(engine: dict) -> None:
    image, text = features(1, 12, 8)
    logits = SCALE * image @ text.T
    own = torch.arange(12)
    oracle = sum(F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    loss = infonce(image, text, scalar(SCALE), label_smoothing=0.1, **engine)["loss"]
    assert relative_error(loss, oracle) < 1e-12
    assert worst_error(gradients(loss, image, text), gradients(oracle, image, text)) < 1e-12


def test_equal_features_give_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1)
    loss = infonce(same, same, scalar(100.0))["loss"]
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-6)


def test_ignoring_equal_captions_without_any_is_the_plain_loss() -> None:
    image, text = features(4, 9, 5)
    plain = infonce(image, text, scalar(SCALE))["loss"]
    ignoring = infonce(image, text, scalar(SCALE), ids=torch.arange(9), same_caption="ignore")["loss"]
    assert ignoring.item() == pytest.approx(plain.item(), rel=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 9), scale=st.floats(0.01, 100))
def test_positives_of_one_id_are_equal_targets_for_all_of_them(seed: int, rows: int, scale: float) -> None:
    # all rows are one thing: the target is uniform, as with label smoothing 1
    image, text = features(seed, rows, 4)
    logits = scale * image @ text.T
    oracle = -(logits.log_softmax(0).mean() + logits.log_softmax(1).mean()) / 2
    ids = torch.zeros(rows, dtype=torch.int64)
    loss = infonce(image, text, scalar(scale), ids=ids, same_caption="positive")["loss"]
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-12)


def test_equal_images_are_left_out_as_equal_captions_are_but_not_what_both_have_in_common_with_a_third() -> None:
    image, text = features(8, 4, 6)
    ids = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]])  # 0 and 1 have a caption in common, 1 and 2 an image
    part = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    logits = SCALE * image @ text.T
    oracle = sum(F.cross_entropy(x.masked_fill(~part, -torch.inf), torch.arange(4)) for x in (logits, logits.T)) / 2
    for tile in (None, 3, "auto"):
        loss = infonce(image, text, scalar(SCALE), ids=ids, same_caption="ignore", tile=tile)["loss"]
        assert loss.item() == pytest.approx(oracle.item(), rel=1e-12)


def test_each_row_shares_its_target_among_as_many_positives_as_it_has() -> None:
    image, text = features(8, 4, 6)
    ids = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2]])
    target = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).double()
    target /= target.sum(dim=1, keepdim=True)
    logits = SCALE * image @ text.T
    oracle = sum(F.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    for tile in (None, 3, "auto"):
        loss = infonce(image, text, scalar(SCALE), ids=ids, same_caption="positive", tile=tile)["loss"]
        assert loss.item() == pytest.approx(oracle.item(), rel=1e-12)
        assert worst_error(gradients(loss, image, text), gradients(oracle, image, text)) < 1e-12


def test_images_that_are_all_different_change_nothing() -> None:
    image, text = features(8, 9, 6)
    captions = torch.arange(9) % 5
    ids = torch.stack([captions, torch.arange(9)], dim=1)
    for same_caption in ("ignore", "positive"):
        plain, both = (infonce(image, text, scalar(SCALE), ids=x, same_caption=same_caption) for x in (captions, ids))
        assert both["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-14)
        assert both["accuracy"] == plain["accuracy"]


def test_accuracy_takes_any_caption_of_the_same_id_as_right_where_it_is_a_positive() -> None:
    eye, ids = torch.eye(4), torch.tensor([0, 1, 2, 2])
    swapped = infonce(eye, eye[[0, 1, 3, 2]], torch.tensor(1.0), ids=ids, same_caption="positive")
    assert swapped["accuracy"] == 1.0


def test_module_binds_the_options() -> None:
    image, text = features(6, 6, 8)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    module = InfoNCE(same_caption="positive", label_smoothing=0.1)
    expected = infonce(image, text, scalar(SCALE), ids=ids, same_caption="positive", label_smoothing=0.1)
    assert module(image, text, scalar(SCALE), ids=ids)["loss"] == expected["loss"]
    assert not module.state_dict()
