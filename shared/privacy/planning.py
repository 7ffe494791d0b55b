"""What an owner can still afford: how many runs or rounds, at how much noise, and which plans fit at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from shared.errors import InputError
from shared.privacy.accounting import check_delta, epsilon
from shared.privacy.calibration import default_max_batch
from shared.privacy.releases import DpSgdRelease, Release
from shared.privacy.running import RunningCost

# Nobody plans for more; an answer of this many means "at least".
MOST_RUNS = 10_000
_MOST_NOISE = 4096.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPoint:
    """One plan of a run and its price.

    Args:
        max_batch: the default cap for it, see :func:`default_max_batch`.
        epsilon_alone: of the run, for an owner who never released anything.
        epsilon_after: of all that was spent, with the run.
        fits: ``epsilon_after`` is within the ceiling.
    """

    rounds: int
    noise_multiplier: float
    sample_rate: float
    max_batch: int
    epsilon_alone: float
    epsilon_after: float
    fits: bool


def affordable_runs(spent: RunningCost, run: Sequence[Release], *, delta: float, ceiling: float) -> int:
    """How many more runs like ``run`` fit below ``ceiling``; 0 for none, at most ``MOST_RUNS``, which is where the
    search ends.

    Raises:
        InputError: ``delta`` does not lie in (0, 1), or ``ceiling`` is not a number above 0.
    """
    return _most_that_fit(spent, run, delta, ceiling, MOST_RUNS)


def affordable_rounds(spent: RunningCost, round: Release, *, delta: float, ceiling: float, most: int) -> int:
    """How many more rounds like ``round`` fit below ``ceiling``; 0 for none, at most ``most``.

    Raises:
        InputError: ``delta`` does not lie in (0, 1), or ``ceiling`` is not a number above 0.
    """
    return _most_that_fit(spent, [round], delta, ceiling, most)


def least_noise(spent: RunningCost, release: DpSgdRelease, *, delta: float, ceiling: float) -> DpSgdRelease | None:
    """``release`` with just as much more noise as it takes to fit below ``ceiling``.

    Returns: ``release`` itself where it fits; else the same steps at the least noise multiplier that fits, rounded up
        by at most 0.2 % to four digits; None where none up to 4096 does.
    Raises:
        InputError: ``delta`` does not lie in (0, 1), or ``ceiling`` is not a number above 0.
    """
    _check_ceiling(ceiling)

    def fits(noise_multiplier: float) -> bool:
        return spent.epsilon_with([replace(release, noise_multiplier=noise_multiplier)], delta) <= ceiling

    low = release.noise_multiplier
    if fits(low):
        return release
    if spent.epsilon(delta) > ceiling:
        return None
    while not fits(high := min(2 * low, _MOST_NOISE)):
        if high >= _MOST_NOISE:
            return None
        low = high
    # Four digits, for what is printed must be what was priced.
    scale = 10 ** max(0, 3 - math.floor(math.log10(high)))
    digits = _first(math.floor(low * scale), math.ceil(high * scale), lambda digits: fits(digits / scale))
    return replace(release, noise_multiplier=digits / scale)


def plan_grid(
    *,
    spent: RunningCost,
    delta: float,
    ceiling: float,
    rounds: Sequence[int],
    noise_multipliers: Sequence[float],
    sample_rates: Sequence[float],
    max_users: int,
    local_steps: int = 1,
) -> list[PlanPoint]:
    """The price of every plan, by noise multiplier, then sample rate, then rounds, as they are given.

    Args:
        max_users: public bound on the users of the owner.
        local_steps: optimizer steps in a round.
    Raises:
        InputError: a number is out of range.
    """
    check_delta(delta)
    _check_ceiling(ceiling)
    points = []
    for noise_multiplier, sample_rate, num_rounds in product(noise_multipliers, sample_rates, rounds):
        run = DpSgdRelease(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            num_steps=num_rounds * local_steps,
            max_users=max_users,
        )
        max_batch = default_max_batch(
            max_users=max_users, sample_rate=sample_rate, num_steps=run.num_steps, delta=delta
        )
        run = replace(run, max_batch=max_batch)
        after = spent.epsilon_with([run], delta)
        points.append(
            PlanPoint(
                rounds=num_rounds,
                noise_multiplier=noise_multiplier,
                sample_rate=sample_rate,
                max_batch=max_batch,
                epsilon_alone=epsilon([run], delta),
                epsilon_after=after,
                fits=after <= ceiling,
            )
        )
    return points


def _most_that_fit(spent: RunningCost, releases: Sequence[Release], delta: float, ceiling: float, most: int) -> int:
    _check_ceiling(ceiling)

    def is_too_much(times: int) -> bool:
        return spent.epsilon_with(releases, delta, times=times) > ceiling

    if most < 1 or spent.epsilon(delta) > ceiling:
        return 0
    tried, fitting = 1, 0
    while not is_too_much(tried):
        if tried == most:
            return most
        fitting, tried = tried, min(2 * tried, most)
    return _first(fitting, tried, is_too_much) - 1


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first whole number for which ``holds``, as it does for ``high`` and does not for ``low``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check_ceiling(ceiling: float) -> None:
    if not ceiling > 0:
        raise InputError(f"a ceiling on epsilon must be greater than 0, not {ceiling!r}.")
