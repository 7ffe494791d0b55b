"""What a ledger has cost so far, as a running total that is added to and never replayed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from shared.privacy.accounting import Step, are_priced, check_delta, epsilon_of, loss_of, steps_of
from shared.privacy.releases import Release

# Every composition takes up to 2e-15 out of delta for its tails. After this many the distribution is composed anew.
_MOST_PIECES = 64


@dataclass(frozen=True, slots=True)
class _Built:
    """The loss of ``steps`` together, ``pieces`` of which were composed onto what was composed at once."""

    steps: Counter[Step]
    loss: Any
    pieces: int


class RunningCost:
    """The price of all releases added so far; one that was never added to is worth 0. Not for two threads at once.

    Adding counts the steps of each kind, nothing else. Their joint loss distribution is composed when a price is asked
    for, from the one composed last and the steps since.

    Guarantee:
        The same as ``epsilon(releases, delta)`` of all releases added, up to rounding: an upper bound as well. Both
        compose the same distributions on one grid, and differ in two things only:

        * Probability in the tails counts as an infinite loss. More compositions move more of it there, and none takes
          any back.
        * Floats are summed in another order. Both set aside more of delta than such sums err by (see ``epsilon_of``),
          so either may be the smaller one, by what moves delta by less than 5e-16 for each step.

        Up to epsilon 50, at a delta of at least 1e-6 and after at most 10,000 steps, they are within 1e-6; with more
        steps or less delta the difference grows in proportion.
    """

    def __init__(self) -> None:
        self._steps: Counter[Step] = Counter()
        self._is_private = True
        self._built: _Built | None = None
        self._known: dict[float, float] = {}

    def add(self, release: Release | None, *, times: int = 1) -> None:
        """Add a release, ``times`` times; None is one without privacy, and makes the price infinite from then on."""
        if release is None:
            self._is_private = False
        else:
            self._steps.update({step: times * count for step, count in steps_of([release]).items()})
        self._known.clear()

    def epsilon(self, delta: float) -> float:
        """The price of what was added.

        Raises:
            InputError: ``delta`` does not lie in (0, 1).
        """
        if delta not in self._known:
            self._known[delta] = self.epsilon_with((), delta)
        return self._known[delta]

    def epsilon_with(self, releases: Sequence[Release | None], delta: float, *, times: int = 1) -> float:
        """The price if ``releases`` were added too, ``times`` times over, 0 or more; adds none.

        Raises:
            InputError: ``delta`` does not lie in (0, 1).
        """
        check_delta(delta)
        private = [release for release in releases if release is not None]
        more = Counter({step: times * count for step, count in steps_of(private).items() if times > 0})
        total = self._steps + more
        if not self._is_private or len(private) < len(releases) or not are_priced(total):
            return math.inf
        if not total:
            return 0.0
        if not self._steps:
            return epsilon_of(loss_of(more), total, delta)
        loss = self._loss()
        return epsilon_of(loss.compose(loss_of(more)) if more else loss, total, delta)

    def copy(self) -> Self:
        """One that can be added to without adding here; as cheap as counting the kinds of steps."""
        other = type(self)()
        other._steps = self._steps.copy()
        other._is_private = self._is_private
        other._built = self._built
        other._known = self._known.copy()
        return other

    def _loss(self) -> Any:
        built = self._built
        if built is None:
            built = self._compose_anew()
        elif since := self._steps - built.steps:
            pieces = built.pieces + len(since)
            if pieces > _MOST_PIECES:
                built = self._compose_anew()
            else:
                built = _Built(self._steps.copy(), built.loss.compose(loss_of(since)), pieces)
        self._built = built
        return built.loss

    def _compose_anew(self) -> _Built:
        return _Built(self._steps.copy(), loss_of(self._steps), 0)
