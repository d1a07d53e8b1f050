import pytest
import torch

from contrastive.losses import DCL, dcl, infonce
from tests.losses.dense import features, gradients, scalar, worst_error

SCALE = 14.3


@pytest.mark.parametrize("engine", [{}, {"tile": 5}, {"tile": None}], ids=str)
def test_is_infonce_minus_the_logarithm_of_one_minus_the_partners_share(engine: dict) -> None:
    # -log p of InfoNCE is DCL's term minus log(1 - p), with p torch's own softmax
    image, text = features(0, 23, 8)
    scale = scalar(SCALE)
    logits = scale * image @ text.T
    oracle = sum(
        (-share.log() + torch.log1p(-share)).mean() for share in (logits.softmax(dim).diagonal() for dim in (0, 1))
    )
    loss = dcl(image, text, scale, **engine)["loss"]
    found, expected = (gradients(value, image, text, scale) for value in (loss, oracle / 2))
    assert worst_error([loss, *found], [oracle / 2, *expected]) < 1e-12


def test_pairs_that_are_easy_still_count_in_a_batch_of_two() -> None:
    # the factor 1 - p of InfoNCE's gradient is 5e-5 here; decoupled, the same features get the whole push
    eye = torch.eye(2, dtype=torch.float64)
    sizes = []
    for loss in (infonce, dcl):
        image = eye.clone().requires_grad_()
        (grad,) = gradients(loss(image, eye, torch.tensor(10.0))["loss"], image)
        sizes.append(grad.norm().item())
    assert sizes[0] / sizes[1] == pytest.approx(1 / (1 + torch.tensor(10.0).exp().item()), rel=1e-6)


def test_can_be_negative() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    assert dcl(eye, eye, scalar(10.0))["loss"].item() == pytest.approx(-10)  # one negative, its logit 0


@pytest.mark.parametrize("tile", [None, 2, "auto"])
def test_pair_whose_negatives_are_all_the_same_caption_has_no_term(tile: int | str | None) -> None:
    image, text = features(1, 5, 4)
    same = torch.zeros(5, dtype=torch.int64)
    loss = dcl(image, text, scalar(SCALE), ids=same, same_caption="ignore", tile=tile)["loss"]
    assert loss == 0
    assert not any(grad.any() for grad in gradients(loss, image, text))


def test_module_binds_the_options() -> None:
    image, text = features(2, 6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3, 3])
    expected = dcl(image, text, scalar(SCALE), ids=ids, same_caption="ignore")["loss"]
    assert DCL(same_caption="ignore")(image, text, scalar(SCALE), ids=ids)["loss"] == expected
    assert expected != dcl(image, text, scalar(SCALE))["loss"]
