"""Say how sure one may be of a difference between arms."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import InputError
from simulations.outcomes import SeedOutcome

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class ArmMeans:
    """Means over test users for every arm, as measured and as resampled.

    Args:
        measured: by arm, the mean over all test users of a seed, averaged over seeds.
        resampled: by arm, shape ``(num_resamples,)``; entry ``b`` of all arms comes from the same users.
    """

    measured: dict[str, float]
    resampled: dict[str, FloatArray]

    def mean(self, arm: str) -> Estimate:
        return _interval(self.measured[arm], self.resampled[arm])

    def difference(self, arm: str, baseline: str) -> Estimate:
        return _interval(self.measured[arm] - self.measured[baseline], self.resampled[arm] - self.resampled[baseline])

    def relative_lift(self, arm: str, baseline: str) -> Estimate | None:
        """``arm ÷ baseline − 1``; None where the baseline is zero."""
        if self.measured[baseline] <= 0 or (self.resampled[baseline] <= 0).any():
            return None
        return _interval(
            self.measured[arm] / self.measured[baseline] - 1, self.resampled[arm] / self.resampled[baseline] - 1
        )

    def gap_closed(self, arm: str, baseline: str, ceiling: str) -> Estimate | None:
        """``(arm − baseline) ÷ (ceiling − baseline)``; None unless the ceiling is above the baseline beyond doubt."""
        if self.difference(ceiling, baseline).low <= 0:
            return None
        gap = self.resampled[ceiling] - self.resampled[baseline]
        gain = self.resampled[arm] - self.resampled[baseline]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = gain / gap
        measured = (self.measured[arm] - self.measured[baseline]) / (self.measured[ceiling] - self.measured[baseline])
        return _interval(measured, ratios[np.isfinite(ratios)])


def paired_bootstrap(outcomes: Sequence[SeedOutcome], *, num_resamples: int, rng: np.random.Generator) -> ArmMeans:
    """Resample seeds, then test users within each owner of a drawn seed; every arm sees the same draw.

    One resample draws as many seeds as there are, with replacement, and for each of them as many test users of every
    owner as that owner has, with replacement; it then takes the mean over users in a seed and over seeds. Seeds differ
    in held-out users, noise and initial weights, so intervals cover these too. Where seeds matter little, intervals
    are somewhat wide, since users are drawn afresh for every drawn seed; where they matter most, somewhat narrow (by
    √(2/3) for three seeds). With one seed they tell about users only.

    Raises:
        InputError: there is no outcome, or seeds differ in their arms.
    Reference:
        Davison & Hinkley 1997, section 3.8, resampling of hierarchical data.
    """
    arms = _arms(outcomes)
    tables = [[np.stack([owner.per_user[arm] for arm in arms], axis=1) for owner in o.owners] for o in outcomes]
    measured = np.mean([np.concatenate(owners).mean(axis=0) for owners in tables], axis=0)
    drawn = rng.integers(len(outcomes), size=(num_resamples, len(outcomes)))
    totals = np.zeros((num_resamples, len(arms)))
    for slot in range(len(outcomes)):
        for seed, owners in enumerate(tables):
            where = np.flatnonzero(drawn[:, slot] == seed)
            sums = sum(_resampled_sums(owner, len(where), rng) for owner in owners)
            totals[where] += sums / sum(len(owner) for owner in owners)
    resampled = totals / len(outcomes)
    return ArmMeans(
        {arm: float(measured[a]) for a, arm in enumerate(arms)}, {arm: resampled[:, a] for a, arm in enumerate(arms)}
    )


def _arms(outcomes: Sequence[SeedOutcome]) -> list[str]:
    if not outcomes:
        raise InputError("no seed has finished, so there is nothing to compare. Run the study first.")
    arms = list(outcomes[0].owners[0].per_user)
    for outcome in outcomes:
        for owner in outcome.owners:
            if set(owner.per_user) != set(arms):
                raise InputError(
                    f"seed {outcome.seed}, {owner.name}: arms {sorted(owner.per_user)} differ from {sorted(arms)}."
                    " Run all seeds with the same study.arms."
                )
    return arms


def _resampled_sums(values: FloatArray, num_resamples: int, rng: np.random.Generator) -> FloatArray:
    num_users = len(values)
    counts = rng.multinomial(num_users, np.full(num_users, 1 / num_users), size=num_resamples)
    return np.asarray(counts @ values, dtype=np.float64)


def _interval(value: float, resampled: FloatArray) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
