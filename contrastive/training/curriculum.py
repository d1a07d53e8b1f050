"""Stages of a run: what the batches and the image tower are like at each place of it.

Small images, short captions and left out patches in most of a run, the real ones at its end: CLIPA (Li et al. 2023,
arXiv:2305.07017), FLIP (Li et al. 2022, arXiv:2212.00794). A stage is a pure function of the place in the run, so a
resumed run needs nothing that a checkpoint does not hold already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from contrastive.training.schedule import Point


class Settings(NamedTuple):
    """Of a stage; None: the model's own.

    image_size: pixels. context: tokens that are kept of a caption. patch_dropout: share of the patches left out.
    """

    image_size: int | None = None
    context: int | None = None
    patch_dropout: float | None = None

    def __str__(self) -> str:
        parts = (
            ("", self.image_size, " px"),
            ("", self.context, " tokens"),
            ("patch dropout ", self.patch_dropout, ""),
        )
        return ", ".join(f"{before}{value:g}{after}" for before, value, after in parts if value is not None)


class Curriculum:
    """Which settings hold when.

    stages: each with its end, in their order. last: what holds behind all of them. unmasked_from: from here on no
    patch is left out, whatever the stage says.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Point, Settings]] = (),
        last: Settings | None = None,
        unmasked_from: Point | None = None,
    ) -> None:
        self.stages, self.last, self.unmasked_from = list(stages), last or Settings(), unmasked_from

    def at(self, step: int, share: float) -> Settings:
        """Of the next step, after `step` steps, which are `share` of the run."""
        settings = next((own for end, own in self.stages if not end.reached(step, share)), self.last)
        if self.unmasked_from is not None and self.unmasked_from.reached(step, share):
            return settings._replace(patch_dropout=0.0)
        return settings


class StagedBatches:
    """The batches of a run, from one loader after another: a stage begins where the one before has ended.

    Loaders go through one order of the samples, of which the step is the place: none comes twice, and none is missed.

    Args:
        make_loader: ``(first step, settings) -> iterable of batches``.
        set_patch_dropout: is called with the rate of a stage, where the stage has one.
        say: is called with a line about each new stage.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        make_loader: Callable[[int, Settings], Any],
        set_patch_dropout: Callable[[float], None],
        say: Callable[[str], None],
    ) -> None:
        self.curriculum, self.make_loader = curriculum, make_loader
        self.set_patch_dropout, self.say = set_patch_dropout, say
        self._settings: Settings | None = None
        self._batches: Iterator[Any] = iter(())

    def fetch(self, step: int, share: float) -> tuple[Any, Exception | None]:
        """The batch of the next step, or the error in its place: a rank that raised would leave the others waiting.

        Every rank must ask with the same `step` and `share`.
        """
        try:
            self._enter(self.curriculum.at(step, share), step)
            return next(self._batches), None
        except Exception as error:
            return None, error

    def _enter(self, settings: Settings, step: int) -> None:
        if settings == self._settings:
            return
        before, self._settings = self._settings, settings
        if settings.patch_dropout is not None:
            self.set_patch_dropout(settings.patch_dropout)
        if before is None or before[:2] != settings[:2]:  # the patches are the tower's business
            self.close()
            self._batches = iter(self.make_loader(step, settings))
        if str(settings):
            self.say(f"from step {step + 1}: {settings}")

    def close(self) -> None:
        """End the processes of the loader in use."""
        getattr(self._batches, "close", lambda: None)()
