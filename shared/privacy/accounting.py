"""What releases cost: epsilon composed over all of them, by two accountants that must agree."""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import dp_accounting
import numpy as np
from dp_accounting import pld
from opacus.accountants import PRVAccountant

from shared.errors import FedAugError, InputError
from shared.privacy.releases import DpSgdRelease

# Privacy losses are rounded up to multiples of this: epsilon is an upper bound at any value, and
# at this one within 0.006 of the finest grid over the range we use.
_DISCRETIZATION = 1e-3


def epsilon(releases: Sequence[DpSgdRelease], delta: float) -> float:
    """The epsilon that ``releases`` cost together at ``delta``; 0 for none.

    Guarantee:
        An upper bound for add/remove neighbours at the level of a user, by privacy loss
        distributions (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380).
    Raises:
        InputError: ``delta`` does not lie in (0, 1).
    """
    _check(delta)
    if not releases:
        return 0.0
    accountant = pld.PLDAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_DISCRETIZATION,
    )
    for (noise_multiplier, sample_rate), num_steps in _merged(releases).items():
        step = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        accountant.compose(step, num_steps)
    return float(accountant.get_epsilon(delta))


def opacus_epsilon(releases: Sequence[DpSgdRelease], delta: float) -> float:
    """The same by Opacus' accountant of privacy random variables: another method, other people's code.

    Source: Gopi et al. 2021, arXiv:2106.02848; the result is an upper bound with 0.01 to spare.
    """
    _check(delta)
    if not releases:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for (noise, rate), steps in _merged(releases).items()]
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")  # its start values come from a Rényi bound that need not be tight
        return float(accountant.get_epsilon(delta))


def certified_epsilon(releases: Sequence[DpSgdRelease], delta: float) -> float:
    """:func:`epsilon`, refused unless Opacus' accountant agrees with it.

    Raises:
        FedAugError: the two differ by more than their rounding: one is wrong, and no number may be reported.
    """
    return _certified(tuple(releases), delta)


@lru_cache(maxsize=64)
def _certified(releases: tuple[DpSgdRelease, ...], delta: float) -> float:
    ours, theirs = epsilon(releases, delta), opacus_epsilon(releases, delta)
    # Both are upper bounds within 0.01 (theirs) and 0.006 (ours) of the truth, by their own error analysis.
    if not abs(ours - theirs) <= 0.02 + 0.01 * ours:
        raise FedAugError(
            f"the accountants disagree: epsilon {ours:.4f} by privacy loss distributions, {theirs:.4f} by Opacus,"
            f" at delta={delta:g} for {list(releases)}. Do not release; report this as a bug."
        )
    return ours


def default_delta(declared_users: int) -> float:
    """``declared_users ** -1.1``: below one over the public total of users of the federation."""
    if declared_users < 2:
        raise InputError(f"federation.declared_users is {declared_users}: a federation declares at least 2 users.")
    return float(declared_users**-1.1)


def _merged(releases: Sequence[DpSgdRelease]) -> dict[tuple[float, float], int]:
    steps: dict[tuple[float, float], int] = {}
    for release in releases:
        key = (release.noise_multiplier, release.sample_rate)
        steps[key] = steps.get(key, 0) + release.num_steps
    return steps


def _check(delta: float) -> None:
    if not (math.isfinite(delta) and 0 < delta < 1):
        raise InputError(f"delta must lie between 0 and 1, both excluded; got {delta!r}.")
