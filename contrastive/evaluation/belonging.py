"""The model that a classifier or a probe was made with, and the check that a given model is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contrastive.errors import UserError
from contrastive.evaluation.protocol import Model
from contrastive.preprocessing import Preprocessing, differences


def identity_of(model: Model) -> dict[str, Any]:
    """`fingerprint` and `preprocessing` of a model of this project, as JSON; both None for another object."""
    from contrastive.models import TwoTower, fingerprint

    if not isinstance(model, TwoTower):
        return {"fingerprint": None, "preprocessing": None}
    return {"fingerprint": fingerprint(model), "preprocessing": model.preprocessing.to_dict()}


def check_belongs(what: str, saved: Mapping[str, Any], model: Model, *, remedy: str) -> None:
    """Check that a file was made with `model`.

    Args:
        what: the file, as the error names it.
        saved: the result of `identity_of` when the file was made. Older files have the fingerprint alone, without the
            preprocessing; a model with `implied_preprocessing` still has that fingerprint.
        remedy: the end of the error's line.

    Raises:
        UserError: the preprocessing or the fingerprint differs; both values are named.
    """
    from contrastive.models import TwoTower, fingerprint
    from contrastive.models.folder import implied_preprocessing

    if not isinstance(model, TwoTower):
        return
    expected, found = saved.get("fingerprint"), fingerprint(model)
    recorded = saved.get("preprocessing")
    if recorded is not None:
        made_with = Preprocessing.from_dict(recorded)
        if made_with != model.preprocessing:
            ours, theirs = differences(made_with, model.preprocessing)
            raise UserError(f"{what} was made with the preprocessing {ours}, the model has {theirs}; {remedy}")
    if expected is None or expected == found:
        return
    if recorded is None and expected == fingerprint(model, recorded=False):
        ours, theirs = differences(implied_preprocessing(model), model.preprocessing)
        raise UserError(
            f"{what} is from before the preprocessing was saved and assumes {ours}, the model has {theirs}; {remedy}"
        )
    raise UserError(f"{what} belongs to the model {expected}, this one is {found}; {remedy}")
