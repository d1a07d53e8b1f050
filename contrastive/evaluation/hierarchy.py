"""Labels with parents: the probability of a parent is the sum of its children's.

Legend: N images, K labels, M names of a level.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from contrastive.errors import UserError


class Hierarchy:
    """What stands above each label, from a mapping child -> parent.

    Level 0 is the labels, level 1 their parents, and so on; a label without a parent at a level stands for itself there
    ("dog" -> "animal", "car" without one: level 1 is animal and car). Names of a level come in the order of the labels.

    Raises:
        UserError: a child that is neither a label nor a parent, a circle.
    """

    def __init__(self, labels: Sequence[str], parents: Mapping[str, str]) -> None:
        self.labels, self.parents = list(labels), {str(child): str(parent) for child, parent in parents.items()}
        known = {*self.labels, *self.parents.values()}
        for child in self.parents:
            if child not in known:
                near = difflib.get_close_matches(child, sorted(known), n=1)
                hint = f"; did you mean '{near[0]}'?" if near else "; remove it, or add it to the labels"
                raise UserError(f"parents: '{child}' is no label and no parent of one{hint}")
        self.chains = [self._chain(label) for label in self.labels]

    @property
    def levels(self) -> int:
        """How many levels there are, the labels' own included."""
        return max(map(len, self.chains))

    def names(self, level: int) -> list[str]:
        """The distinct names of a level."""
        return list(dict.fromkeys(self._ancestors(level)))

    def probabilities(self, probabilities_NK: NDArray[np.floating], level: int) -> NDArray[np.floating]:
        """Probabilities of the names of a level (N, M): the sums over the labels below each."""
        column = {name: index for index, name in enumerate(self.names(level))}
        member_KM = np.zeros((len(self.labels), len(column)), probabilities_NK.dtype)
        member_KM[np.arange(len(self.labels)), [column[name] for name in self._ancestors(level)]] = 1
        sums: NDArray[np.floating] = probabilities_NK @ member_KM
        return sums

    def _ancestors(self, level: int) -> list[str]:
        if not 0 <= level < self.levels:
            raise UserError(f"level {level}: the labels have levels 0 to {self.levels - 1}")
        return [chain[min(level, len(chain) - 1)] for chain in self.chains]

    def _chain(self, label: str) -> list[str]:
        chain = [label]
        while chain[-1] in self.parents:
            above = self.parents[chain[-1]]
            if above in chain:
                raise UserError(f"parents: {' -> '.join([*chain, above])} is a circle; remove one of its parents")
            chain.append(above)
        return chain
