"""Names for classes that a data set numbers or codes: folders 1, 2, 10 or n01440764."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from contrastive.errors import UserError
from contrastive.evaluation.labels import are_numbers, check_labels, in_order
from contrastive.wording import first_few

ClassNames = Mapping[str, str] | Sequence[str]


def class_name_map(labels: Iterable[str], names: ClassNames, where: str = "class names") -> dict[str, str]:
    """The name of each distinct label of a data set.

    Args:
        labels: of all sets at hand, as folders or columns spell them.
        names: label -> name; labels that the data do not have are allowed. Or a list of names in the order of the
            numbers, for labels that are numbers counted from 0 or from 1. The labels must show which of the two: they
            hold 0, or the number of names.
        where: what an error begins with.

    Raises:
        UserError: a label without a name, one name for two labels, a list that does not say where counting begins.
    """
    found = in_order(labels)
    mapping = dict(names) if isinstance(names, Mapping) else _numbered(found, check_labels(names), where)
    missing = [label for label in found if label not in mapping]
    if missing:
        raise UserError(
            f"{where}: no name for {first_few(missing)}; names are given for {first_few(mapping)}; add the missing ones"
        )
    owners = defaultdict(list)
    for label in found:
        owners[mapping[label].strip()].append(label)
    for name, own in owners.items():
        if not name:
            raise UserError(f"{where}: the name of {own[0]} is empty; give one")
        if len(own) > 1:
            raise UserError(f"{where}: '{name}' is the name of {' and '.join(own)}; give each class a name of its own")
    return {label: mapping[label].strip() for label in found}


def named_labels(labels: Sequence[str], names: ClassNames | None, where: str) -> list[str]:
    """The labels by the names of `class_name_map`; as they are where `names` is None."""
    if names is None:
        return list(labels)
    mapping = class_name_map(labels, names, where)
    return [mapping[label] for label in labels]


def _numbered(found: Sequence[str], names: list[str], where: str) -> dict[str, str]:
    if not are_numbers(found):
        odd = next(label for label in found if not are_numbers([label]))
        raise UserError(
            f"{where}: names in order need classes that are numbers, got '{odd}'; give folder and name: JSON "
            '{"FOLDER": "name"} or a CSV of two columns'
        )
    numbers = [int(label) for label in found]
    fits = [first for first in (0, 1) if first <= min(numbers) and max(numbers) < first + len(names)]
    if len(fits) != 1:
        reason = "counting may begin at 0 or at 1" if fits else "they do not fit"
        raise UserError(
            f"{where}: {len(names)} names for classes {found[0]} to {found[-1]}: {reason}; give number and name: JSON "
            '{"0": "name"} or a CSV of two columns'
        )
    return {label: names[int(label) - fits[0]] for label in found}
