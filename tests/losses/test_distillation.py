import pytest
import torch
from open_clip.loss import DistillClipLoss

from contrastive.errors import UserError
from contrastive.losses import Distillation, distillation
from tests.losses.dense import features, gradients, scalar, worst_error

SCALE, TEACHER_SCALE = 12.5, 40.0
ENGINES = [{}, {"tile": 5}, {"tile": None}]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_open_clip_with_gradients(dtype: torch.dtype, tolerance: float, engine: dict) -> None:
    leaves = *features(0, 23, 16, dtype), scalar(SCALE, dtype)
    teacher = [x.detach() for x in features(1, 23, 6, dtype)]
    _, oracle = DistillClipLoss()(*leaves, *teacher, torch.tensor(TEACHER_SCALE, dtype=dtype))
    options = {"teacher_image": teacher[0], "teacher_text": teacher[1], "teacher_scale": TEACHER_SCALE}
    loss = distillation(*leaves, **options, **engine)["loss"]
    assert worst_error([loss, *gradients(loss, *leaves)], [oracle, *gradients(oracle, *leaves)]) < tolerance


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_gradient_is_zero_where_the_student_is_the_teacher(engine: dict) -> None:
    leaves = *features(2, 15, 8), scalar(SCALE)
    teacher = {"teacher_image": leaves[0], "teacher_text": leaves[1]}
    same = distillation(*leaves, **teacher, teacher_scale=SCALE, **engine)["loss"]
    other = distillation(*leaves, **teacher, teacher_scale=2 * SCALE, **engine)["loss"]
    assert all(grad.abs().max() < 1e-12 for grad in gradients(same, *leaves))
    assert gradients(other, *leaves)[0].abs().max() > 1e-3


def test_nothing_flows_to_the_teacher() -> None:
    leaves = *features(3, 7, 8), scalar(SCALE)
    teacher_image, teacher_text = features(4, 7, 8)
    for tile in ("auto", None):
        loss = distillation(*leaves, teacher_image=teacher_image, teacher_text=teacher_text, tile=tile)["loss"]
        assert torch.autograd.grad(loss, (teacher_image, teacher_text), allow_unused=True) == (None, None)


def test_module_looks_the_teacher_up_by_sample_number() -> None:
    leaves = *features(5, 4, 8), scalar(SCALE)
    teacher_image, teacher_text = (x.detach() for x in features(6, 10, 6))
    samples = torch.tensor([7, 0, 9, 3])
    module = Distillation(teacher_image, teacher_text, teacher_scale=TEACHER_SCALE)
    found = module(*leaves, samples=samples)["loss"]
    rows = {"teacher_image": teacher_image[samples], "teacher_text": teacher_text[samples]}
    assert found == distillation(*leaves, **rows, teacher_scale=TEACHER_SCALE)["loss"]
    assert not module.state_dict()  # the teacher is no part of a checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_image": torch.eye(3)}, r"teacher_image \(3, 3\): the teacher's features of the same 4 pairs"),
        ({"teacher_text": torch.eye(4, 5)}, r"teacher_text \(4, 5\).*of one width"),
        ({"teacher_text": 2 * torch.eye(4)}, "teacher_text features: row 0 has norm 2"),
        ({"teacher_scale": 0.0}, "teacher_scale 0.0: choose the teacher's logit scale, above 0"),
        ({"teacher_scale": float("inf")}, "teacher_scale inf"),
    ],
)
def test_teacher_that_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distillation(
            *features(5, 4, 8),
            scalar(SCALE),
            **({"teacher_image": torch.eye(4), "teacher_text": torch.eye(4)} | change),
        )
