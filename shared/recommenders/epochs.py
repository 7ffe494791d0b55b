"""Train in epochs, of which tuning chooses how many, beside synthetic users that may fade."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from shared.data.histories import Histories
from shared.recommenders.base import Fitted, Schedule

_NUM_STOPS = 10


@dataclass(frozen=True, slots=True)
class TrainedInEpochs(ABC):
    """A network with Adam.

    Args:
        num_items: of the catalogue.
        hidden_size: width of the network.
        epochs: passes that a whole training makes; whatever changes in its course, changes as if all of them were
            made.
        stop_after: passes after which the training ends; None makes all of them, and lets tuning choose.
    """

    num_items: int
    hidden_size: int
    epochs: int
    learning_rate: float
    device: torch.device
    stop_after: int | None = None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        return ("constant", "fade")

    def variants(self) -> tuple[Self, ...]:
        """Early stopping: the same training, ended after each tenth of it."""
        if self.stop_after is not None:
            return (self,)
        stops = sorted({-(-self.epochs * tenth // _NUM_STOPS) for tenth in range(1, _NUM_STOPS + 1)})
        return tuple(replace(self, stop_after=stop) for stop in stops)

    def fit(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> Fitted:
        stop = self.epochs if self.stop_after is None else self.stop_after
        return self._train(real, synthetic, weight=weight, schedule=schedule, seed=seed, stops=(stop,))[0]

    def fit_variants(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> Iterator[Fitted]:
        stops = [variant.stop_after for variant in self.variants() if variant.stop_after is not None]
        return iter(self._train(real, synthetic, weight=weight, schedule=schedule, seed=seed, stops=stops))

    @abstractmethod
    def _train(
        self,
        real: Histories,
        synthetic: Histories | None,
        *,
        weight: float,
        schedule: Schedule,
        seed: int,
        stops: Sequence[int],
    ) -> Sequence[Fitted]:
        """One training to the last of ``stops``, which rise; the model as it is after each of them."""


def share_of_weight(schedule: Schedule, share_done: float) -> float:
    """What synthetic users count, of their weight, when ``share_done`` of the training lies behind."""
    return 1.0 if schedule == "constant" else 1.0 - share_done
