"""Weighted sums, and losses of the user's own, which this file defines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contrastive.errors import UserError
from contrastive.losses import CustomLoss, CyCLIP, InfoNCE, SigLIP, SogCLR, WeightedSum, cyclip, infonce, siglip, sogclr
from tests.losses.dense import features, gradients, scalar, worst_error

HERE = __name__


def leaves() -> tuple[Tensor, ...]:
    return *features(0, 8, 6), scalar(9.0), scalar(-3.0)


def test_sum_is_each_loss_times_its_weight() -> None:
    arguments = leaves()
    found = WeightedSum([("nce", InfoNCE(), 0.7), ("sig", SigLIP(), 0.2), ("cyc", CyCLIP(), 3.0)])(*arguments)["loss"]
    terms = [loss(*arguments)["loss"] for loss in (infonce, siglip, cyclip)]
    oracle = 0.7 * terms[0] + 0.2 * terms[1] + 3.0 * terms[2]
    assert worst_error([found, *gradients(found, *arguments)], [oracle, *gradients(oracle, *arguments)]) < 1e-12


def test_what_each_term_logs_is_named_after_it_and_without_its_weight() -> None:
    arguments = leaves()
    found = WeightedSum([("nce", InfoNCE(), 0.7), ("cyc", CyCLIP(), 3.0)])(*arguments)
    assert set(found) == {"loss", "nce_loss", "nce_accuracy", "cyc_loss", "cyc_in_modal", "cyc_cross_modal"}
    assert found["nce_loss"] == infonce(*arguments)["loss"]
    assert not any(value.requires_grad for key, value in found.items() if key != "loss")


def test_ids_and_valid_rows_reach_every_term() -> None:
    arguments, ids, valid = leaves(), torch.tensor([0, 0, 1, 2, 3, 4, 4, 5]), torch.arange(8) != 3
    further = {"ids": ids, "valid": valid}
    found = WeightedSum([("a", InfoNCE(same_caption="ignore"), 1.0), ("b", SigLIP(), 1.0)])(*arguments, **further)
    assert found["a_loss"] == infonce(*arguments, **further, same_caption="ignore")["loss"]
    assert found["b_loss"] == siglip(*arguments, **further)["loss"]


def test_sample_numbers_go_to_those_that_need_them_only() -> None:
    loss = WeightedSum([("nce", InfoNCE(), 1.0), ("global", SogCLR(samples=20), 0.5)])
    assert loss.needs == ("samples",)
    arguments, samples = leaves(), torch.arange(8) + 10
    found = loss(*arguments, samples=samples)  # InfoNCE would raise TypeError if it got them
    unseen = torch.full((8, 2), -torch.inf)
    assert found["global_loss"] == sogclr(*arguments, log_u=unseen)["loss"]
    assert loss.losses["global"].log_u[10:18].isfinite().all()


def test_sum_without_a_loss_that_needs_samples_asks_for_none() -> None:
    assert WeightedSum([("nce", InfoNCE(), 1.0)]).needs == ()


def test_state_of_the_terms_is_the_state_of_the_sum() -> None:
    loss = WeightedSum([("nce", InfoNCE(), 1.0), ("global", SogCLR(samples=20), 0.5)])
    assert list(loss.state_dict()) == ["losses.global.log_u"]


@pytest.mark.parametrize("names", [[], ["a", "a"]], ids=str)
def test_sum_needs_terms_with_different_names(names: list[str]) -> None:
    with pytest.raises(UserError, match="give at least one, and each a name of its own"):
        WeightedSum([(name, InfoNCE(), 1.0) for name in names])


# ---- a loss of the user's own


def takes_no_ids(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, power: int = 1) -> dict[str, Tensor]:
    return {"loss": image.sum() * power}


class WithParameters(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


def own_function(
    image: Tensor, text: Tensor, scale: Tensor, *contract: Any, power: int = 1, **rest: Any
) -> dict[str, Tensor]:
    return {"loss": ((image - text) ** 2).sum() ** power + 0 * scale}


def takes_anything(image: Tensor, text: Tensor, scale: Tensor, *contract: Any, **keywords: Any) -> dict[str, Tensor]:
    return {"loss": image.sum() * keywords["factor"]}


def returns_a_tensor(*arguments: Any, **rest: Any) -> Tensor:
    return torch.zeros(())


def returns_a_dict_without_loss(*arguments: Any, **rest: Any) -> dict[str, Tensor]:
    return {"value": torch.zeros(())}


def returns_a_loss_a_row(image: Tensor, *arguments: Any, **rest: Any) -> dict[str, Tensor]:
    return {"loss": image.sum(dim=1)}


class OwnClass:
    def __init__(self, weight: float) -> None:
        if weight < 0:
            raise ValueError("weight below 0")
        self.weight = weight

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, *contract: Any) -> dict[str, Tensor]:
        return {"loss": self.weight * image.sum()}


class OwnModule(nn.Module):
    needs = ("samples",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(size))

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, *contract: Any, samples: Tensor) -> dict[str, Tensor]:
        self.seen[samples] += 1
        return {"loss": image.sum()}


NOT_CALLABLE = 3


class MakesNothing:
    """A class whose instances are no functions."""


def detached(image: Tensor, *contract: Any, **more: Any) -> dict[str, Tensor]:
    return {"loss": image.detach().sum()}


def test_function_is_called_with_its_bound_arguments() -> None:
    arguments = leaves()
    found = CustomLoss(f"{HERE}:own_function", {"power": 2})(*arguments)["loss"]
    assert found == own_function(*arguments[:3], power=2)["loss"]
    assert found != CustomLoss(f"{HERE}:own_function")(*arguments)["loss"]


def test_function_of_any_keywords_takes_any_argument() -> None:
    arguments = leaves()
    found = CustomLoss(f"{HERE}:takes_anything", {"factor": 3.0})(*arguments)["loss"]
    assert found == 3 * arguments[0].sum()


def test_class_is_constructed_with_its_arguments() -> None:
    arguments = leaves()
    assert CustomLoss(f"{HERE}:OwnClass", {"weight": 2.0})(*arguments)["loss"] == 2 * arguments[0].sum()


def test_module_keeps_its_state_and_its_needs() -> None:
    loss = WeightedSum([("own", CustomLoss(f"{HERE}:OwnModule", {"size": 20}), 1.0)])
    assert loss.needs == ("samples",)
    loss(*leaves(), samples=torch.arange(8))
    (state,) = loss.state_dict().values()
    assert state.sum() == 8


def test_own_loss_takes_part_in_a_sum() -> None:
    arguments = leaves()
    found = WeightedSum([("nce", InfoNCE(), 1.0), ("own", CustomLoss(f"{HERE}:own_function"), 0.5)])(*arguments)
    expected = infonce(*arguments)["loss"] + 0.5 * own_function(*arguments[:3])["loss"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("no_colon", {}, "loss.path: 'no_colon' is no import path such as my_package.losses:MyLoss"),
        (":name", {}, "is no import path"),
        ("no_such_module:name", {}, "loss.path: no_such_module cannot be imported here.*start in the folder"),
        (f"{HERE}:missing", {}, f"{HERE} has no missing"),
        (f"{HERE}:NOT_CALLABLE", {}, "loss.path: .*NOT_CALLABLE is int, neither a function nor a class"),
        (f"{HERE}:MakesNothing", {}, "loss.path: .*MakesNothing makes a MakesNothing, which cannot be called"),
        (f"{HERE}:takes_no_ids", {}, "loss.args: .*takes_no_ids does not take {} .*argument 'ids'"),
        (f"{HERE}:own_function", {"image": 2}, "loss.args: .* does not take {'image': 2} .*multiple values"),
        (f"{HERE}:OwnClass", {"wieght": 2.0}, "loss.args: .*OwnClass does not take {'wieght': 2.0}"),
        (f"{HERE}:OwnClass", {"weight": -1.0}, "loss.args: .*OwnClass refuses .*weight below 0"),
        (f"{HERE}:WithParameters", {}, "loss.path: .*WithParameters has parameters, which no optimizer trains"),
    ],
)
def test_loss_that_cannot_be_had_is_named(path: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CustomLoss(path, arguments)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("returns_a_tensor", "tensor"), ("returns_a_dict_without_loss", "{'value'"), ("returns_a_loss_a_row", "{'loss'")],
)
def test_result_without_a_0d_loss_is_refused(name: str, shown: str) -> None:
    with pytest.raises(UserError, match=f"{name} must return a dict with a 0-d tensor 'loss'; it returned {shown}"):
        CustomLoss(f"{HERE}:{name}")(*leaves())


def test_a_module_that_fails_by_itself_is_not_taken_for_one_without_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken_losses.py").write_text("import torch\nfast = torch.no_such_thing\ndef loss(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"cannot be imported here \(AttributeError: .*no_such_thing"):
        CustomLoss("own_broken_losses:loss")


def test_a_loss_without_a_gradient_is_refused() -> None:
    with pytest.raises(UserError, match="the 'loss' of .*detached has no gradient; do not detach it"):
        CustomLoss(f"{HERE}:detached")(*leaves())
