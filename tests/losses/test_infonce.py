import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.errors import UserError
from contrastive.losses import InfoNCE, infonce
from tests.losses.dense import features, gradients, infonce_dense, relative_error

SCALE = 14.3


def scalar(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_open_clip_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    image, text = features(0, 37, 16, dtype)
    scale, bias = scalar(SCALE, dtype), scalar(-3.0, dtype)
    oracle = open_clip.ClipLoss()(image, text, scale, bias)
    loss = infonce(image, text, scale, bias)["loss"]
    assert relative_error(loss, oracle) < tolerance
    *found, found_bias = gradients(loss, image, text, scale, bias)
    *expected, expected_bias = gradients(oracle, image, text, scale, bias)
    assert max(map(relative_error, found, expected)) < tolerance
    # a bias common to all logits cancels: the peer's gradient for it is rounding, ours is exactly zero
    assert found_bias == 0
    assert abs(expected_bias) < tolerance


def test_label_smoothing_equals_torch_cross_entropy() -> None:
    image, text = features(1, 12, 8)
    logits = SCALE * image @ text.T
    own = torch.arange(12)
    oracle = sum(F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    loss = infonce(image, text, scalar(SCALE), label_smoothing=0.1)["loss"]
    assert relative_error(loss, oracle) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    dim=st.integers(1, 6),
    scale=st.floats(0.01, 100),
    same_caption=st.sampled_from(["negative", "ignore", "positive"]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    data=st.data(),
)
def test_equals_dense_loops_for_any_shape_ids_and_valid_rows(
    seed: int,
    rows: int,
    dim: int,
    scale: float,
    same_caption: str,
    label_smoothing: float,
    data: st.DataObject,
) -> None:
    image, text = features(seed, rows, dim)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    t = scalar(scale)
    options = {"same_caption": same_caption, "label_smoothing": label_smoothing}
    loss = infonce(image, text, t, ids=ids, valid=valid, **options)["loss"]
    oracle = infonce_dense(image, text, t, ids, valid, **options)
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-9, abs=1e-9)
    if not oracle.requires_grad:
        oracle = oracle + 0 * t
    found, expected = gradients(loss, image, text, t), gradients(oracle, image, text, t)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("same_caption", ["negative", "ignore", "positive"])
def test_row_that_is_not_valid_changes_nothing(same_caption: str) -> None:
    image, text = features(2, 7, 5)
    ids = torch.tensor([0, 1, 1, 2, 0, 3, 1])
    keep = torch.tensor([True, True, False, True, True, False, True])
    masked = infonce(image, text, scalar(SCALE), ids=ids, valid=keep, same_caption=same_caption)
    alone = infonce(image[keep], text[keep], scalar(SCALE), ids=ids[keep], same_caption=same_caption)
    assert masked["loss"].item() == pytest.approx(alone["loss"].item(), rel=1e-12)
    assert masked["accuracy"] == alone["accuracy"]
    found = gradients(masked["loss"], image, text)
    expected = gradients(alone["loss"], image, text)
    assert max(map(relative_error, found, expected)) < 1e-12
    assert not found[0][~keep].any()


def test_batch_without_a_valid_row_has_zero_loss_and_gradient() -> None:
    image, text = features(3, 4, 5)
    scale = scalar(SCALE)
    loss = infonce(image, text, scale, valid=torch.zeros(4, dtype=torch.bool))["loss"]
    assert loss == 0
    assert not any(grad.any() for grad in gradients(loss, image, text, scale))


def test_equal_features_give_the_logarithm_of_the_batch() -> None:
    same = F.normalize(torch.ones(8, 4, dtype=torch.float64), dim=1)
    assert infonce(same, same, scalar(100.0))["loss"].item() == pytest.approx(torch.tensor(8.0).log().item())


def test_ignoring_equal_captions_without_any_is_the_plain_loss() -> None:
    image, text = features(4, 9, 5)
    plain = infonce(image, text, scalar(SCALE))["loss"]
    ignoring = infonce(image, text, scalar(SCALE), ids=torch.arange(9), same_caption="ignore")["loss"]
    assert ignoring.item() == pytest.approx(plain.item(), rel=1e-14)


def test_accuracy_counts_images_whose_nearest_caption_is_theirs() -> None:
    eye = torch.eye(4)
    assert infonce(eye, eye[[0, 1, 3, 2]], torch.tensor(1.0))["accuracy"] == 0.5


def test_accuracy_takes_any_caption_of_the_same_id_as_right_where_it_is_a_positive() -> None:
    eye, ids = torch.eye(4), torch.tensor([0, 1, 2, 2])
    swapped = infonce(eye, eye[[0, 1, 3, 2]], torch.tensor(1.0), ids=ids, same_caption="positive")
    assert swapped["accuracy"] == 1.0


def test_logits_stay_float32_under_autocast() -> None:
    image, text = features(5, 16, 8, torch.float32)
    scale = scalar(100.0, torch.float32)
    plain = infonce(image, text, scale)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        under = infonce(image, text, scale)["loss"]
    assert under.dtype == torch.float32
    assert under == plain


def test_half_precision_features_are_promoted() -> None:
    image, text = features(5, 6, 8, torch.bfloat16)
    loss = infonce(image, text, scalar(SCALE, torch.float32))["loss"]
    oracle = open_clip.ClipLoss()(image.float(), text.float(), torch.tensor(SCALE))
    assert loss.dtype == torch.float32
    assert relative_error(loss, oracle) < 1e-6


def test_module_binds_the_options() -> None:
    image, text = features(6, 6, 8)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    module = InfoNCE(same_caption="positive", label_smoothing=0.1)
    expected = infonce(image, text, scalar(SCALE), ids=ids, same_caption="positive", label_smoothing=0.1)
    assert module(image, text, scalar(SCALE), ids=ids)["loss"] == expected["loss"]
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(4, 6)}, r"image \(4, 5\) and text \(4, 6\)"),
        ({"image": torch.zeros(3, 5)}, r"image \(3, 5\) and text \(4, 5\)"),
        ({"image": torch.zeros(0, 5), "text": torch.zeros(0, 5)}, "n > 0"),
        ({"image": torch.zeros(4, 5, dtype=torch.int64)}, "floating-point"),
        ({"scale": torch.ones(4)}, r"scale of shape \(4,\)"),
        ({"bias": torch.ones(4)}, r"bias of shape \(4,\)"),
        ({"ids": torch.arange(3)}, r"ids is torch.int64 \(3,\)"),
        ({"ids": torch.zeros(4)}, "ids is torch.float32"),
        ({"valid": torch.ones(4, dtype=torch.int64)}, "valid is torch.int64"),
        ({"same_caption": "ignore"}, "pass `ids`, or use 'negative'"),
        ({"same_caption": "drop"}, "choose one of negative, ignore, positive"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
    ],
)
def test_argument_that_does_not_fit_is_named(change: dict, message: str) -> None:
    arguments = {"image": torch.zeros(4, 5), "text": torch.zeros(4, 5), "scale": torch.tensor(1.0)} | change
    with pytest.raises(UserError, match=message):
        infonce(**arguments)
