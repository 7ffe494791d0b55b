"""What releases cost: epsilon composed over all of them, by three accountants that must agree."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from scipy import stats

from shared.errors import FedAugError, InputError
from shared.privacy.releases import DpSgdRelease, Release

# Privacy losses are rounded up to multiples of this: epsilon is an upper bound at any value, and at this one within
# 0.006 of the finest grid over the range we use. Thousands of steps with less signal than the grid cost too much: by
# 2 % at sample_rate / noise_multiplier 0.002, 9 % at 0.001, 31 % at 0.0005.
_DISCRETIZATION = 1e-3
# Less noise than this protects nobody: one full-batch step costs an epsilon above 90. The grid would grow with it, from
# a minute's work at 0.01 to more than fits in memory, and releases come from strangers.
_LEAST_NOISE = 0.1
# Nor is there a use for telling prices above this apart; a million steps would take minutes and tens of gigabytes.
_MOST_LOSS = 1000.0
# A sum of N losses is a power of a Fourier transform, whose error grows with N. Against the same power in 80-bit
# floats, delta was never wrong by more than 0.8 * 2.2e-16 for each step (30 mechanisms, 10 to a million steps).
_ROUNDING_OF_STEP = 5e-16
# Rényi orders: near 1 for an epsilon in the hundreds, large for one near 0. Beyond 4096 they would tell apart what the
# grid above does not.
_ORDERS = (
    *(1 + hundredths / 100 for hundredths in (2, 4, 6, 8)),
    *(1 + tenths / 10 for tenths in range(1, 20)),
    *(3 + quarters / 4 for quarters in range(28)),
    *range(10, 64, 2),
    *(round(64 * 2 ** (halves / 2)) for halves in range(13)),
)


class Step(NamedTuple):
    """All of a step that sets its price: steps that are equal here are steps of one kind.

    Args:
        noise_multiplier: of the step.
        sample_rate: of the step.
        tight: the chance that at least ``max_batch`` of the *other* users are drawn, for the largest owner.
    """

    noise_multiplier: float
    sample_rate: float
    tight: float


def epsilon(releases: Sequence[Release], delta: float) -> float:
    """The epsilon that ``releases`` cost together at ``delta``; 0 for none.

    A cap costs something: under it, a user can push another one out of the batch. Call a step tight where at
    least ``max_batch`` of the *other* users were drawn; whether it is does not depend on the user. So it may as well
    be published, and the privacy loss of a step is a mixture:

    * not tight: Poisson sampling, as without a cap;
    * tight: the batch without the user is a uniformly random set of ``max_batch`` others, and with a chance of at
      most ``sample_rate`` the user takes the place of one of them, which moves the sum by up to *twice* the clip.

    dp-accounting's ``TruncatedSubsampledGaussianDpEvent`` (arXiv:2508.15089) splits a step in the same way, for an
    owner whose number of users is known. Ours is hidden below ``max_users``, so both chances are taken at their
    largest. That of a tight step grows with the users. That of taking a place falls with them, and at ``max_users``
    itself may be far below what a smaller owner needs: at rate 0.05, cap 112, noise 2 and 400 steps, the event asks
    epsilon 0.1 of 100,000 users and 7.0 of 2,500.

    Guarantee:
        An upper bound for adding or removing one user of any owner with at most ``max_users``, by privacy loss
        distributions (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380). It never
        falls as ``max_users`` grows, and never lies below the price without caps.
        Infinite below a noise multiplier of 0.1, in the thousands, and where ``delta`` is below what floats can sum:
        5e-16 for each step.
    Raises:
        InputError: ``delta`` does not lie in (0, 1).
    """
    check_delta(delta)
    steps = steps_of(releases)
    if not steps:
        return 0.0
    return epsilon_of(loss_of(steps), steps, delta) if are_priced(steps) else math.inf


def steps_of(releases: Sequence[Release]) -> dict[Step, int]:
    """How many steps of each kind ``releases`` are together."""
    steps: dict[Step, int] = {}
    for release in releases:
        kind = Step(release.noise_multiplier, release.sample_rate, _tight(release))
        steps[kind] = steps.get(kind, 0) + release.num_steps
    return steps


def are_priced(steps: Mapping[Step, int]) -> bool:
    """Whether ``steps`` have a finite price: noise enough to protect anyone, and a privacy loss below the thousands."""
    if any(step.noise_multiplier < _LEAST_NOISE for step in steps):
        return False
    return sum(count * _least_mean_loss(step) for step, count in steps.items()) <= _MOST_LOSS


def loss_of(steps: Mapping[Step, int]) -> Any:
    """The privacy loss distribution of ``steps`` together; they must be priced, and at least one."""
    parts = [_loss_of_steps(step, count) for step, count in steps.items()]
    return reduce(lambda one, other: one.compose(other), parts)


def epsilon_of(loss: Any, steps: Mapping[Step, int], delta: float) -> float:
    """The epsilon of ``loss``, however it was composed of ``steps``."""
    safe = delta - _ROUNDING_OF_STEP * sum(steps.values())
    return float(loss.get_epsilon_for_delta(safe)) if safe > 0 else math.inf


def opacus_epsilon(releases: Sequence[Release], delta: float) -> float:
    """The same by Opacus' accountant of privacy random variables: another method, other people's code.

    Opacus knows no caps: this is the price of ``releases`` as if no batch were capped.

    Source: Gopi et al. 2021, arXiv:2106.02848; the result is an upper bound with 0.01 to spare.
    """
    check_delta(delta)
    if not releases:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, count) for (noise, rate, _), count in steps_of(_uncapped(releases)).items()]
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")  # its start values come from a Rényi bound that need not be tight
        return max(0.0, float(accountant.get_epsilon(delta)))


def rdp_epsilon(releases: Sequence[Release], delta: float) -> float:
    """An upper bound by Rényi divergences, which no discretization and no Fourier transform touches.

    Like Opacus' accountant it knows no caps. It lies above :func:`epsilon`, most often by 5 to 15 %, and does not fall
    much below 0.001.

    Source: Mironov et al. 2019, arXiv:1908.10530, as implemented by dp-accounting; infinite below a noise multiplier
    of 0.1.
    """
    check_delta(delta)
    steps = steps_of(_uncapped(releases))
    if any(step.noise_multiplier < _LEAST_NOISE for step in steps):
        return math.inf
    accountant = RdpAccountant(_ORDERS)
    with _silent_about_orders():
        for (noise, rate, _), count in steps.items():
            accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta))


def certified_epsilon(releases: Sequence[Release], delta: float) -> float:
    """:func:`epsilon`, refused unless what can be checked by other means agrees with it.

    Without caps, Opacus' accountant must give the same and the Rényi bound no less. With caps, epsilon must lie
    between the price without them and the price if every step in which a cap may bind gave everything away. An
    infinite epsilon promises nothing that could be wrong.

    Raises:
        FedAugError: they differ by more than their rounding: one is wrong, and no number may be reported.
    """
    return _certified(tuple(releases), delta)


@lru_cache(maxsize=64)
def _certified(releases: tuple[Release, ...], delta: float) -> float:
    uncapped = _uncapped(releases)
    plain = epsilon(uncapped, delta)
    if math.isinf(plain):
        return plain
    theirs = opacus_epsilon(uncapped, delta)
    # Both are upper bounds within 0.01 (theirs) and 0.006 (ours) of the truth, by their own error analysis.
    allowed = 0.02 + 0.01 * plain
    if not abs(plain - theirs) <= allowed:
        raise FedAugError(
            f"the accountants disagree: epsilon {plain:.4f} by privacy loss distributions, {theirs:.4f} by Opacus,"
            f" at delta={delta:g} for {list(uncapped)}. Do not release; report this as a bug."
        )
    bound = rdp_epsilon(uncapped, delta)
    if not bound >= plain - allowed:
        raise FedAugError(
            f"the accountants disagree: epsilon {plain:.4f} by privacy loss distributions lies above its Rényi bound"
            f" {bound:.4f}, at delta={delta:g} for {list(uncapped)}. Do not release; report this as a bug."
        )
    if uncapped == releases:
        return plain
    ours = epsilon(releases, delta)
    # Lost altogether, the steps in which a cap may bind take their probability out of delta.
    lost = sum(_tight(release) * release.num_steps for release in releases)
    most = epsilon(uncapped, delta - lost) if lost < delta else math.inf
    rounding = 1e-3 * (1 + plain)  # all three lie on one grid; this is for its tails and sums
    if not plain - rounding <= ours <= most + rounding:
        raise FedAugError(
            f"the accountants disagree: epsilon {ours:.4f} with capped batches must lie between {plain:.4f} and"
            f" {most:.4f}, at delta={delta:g} for {list(releases)}. Do not release; report this as a bug."
        )
    return ours


def default_delta(declared_users: int) -> float:
    """``declared_users ** -1.1``: below one over the public total of users of the federation."""
    if declared_users < 2:
        raise InputError(f"federation.declared_users is {declared_users}: a federation declares at least 2 users.")
    return float(declared_users**-1.1)


def check_delta(delta: float) -> None:
    """Raise InputError unless ``delta`` lies in (0, 1)."""
    if not (math.isfinite(delta) and 0 < delta < 1):
        raise InputError(f"delta must lie between 0 and 1, both excluded; got {delta!r}.")


def _least_mean_loss(step: Step) -> float:
    """A lower bound on the mean privacy loss of a step; where it is tight, of the user's taking one place."""
    apart = _least_divergence(step.noise_multiplier, step.sample_rate)
    return step.tight * _least_divergence(step.noise_multiplier / 2, step.sample_rate) + (1 - step.tight) * apart


def _least_divergence(noise_multiplier: float, sample_rate: float) -> float:
    """A lower bound on E_P log(P/Q) for P = (1-q) N(0) + q N(1) and Q = N(0).

    No P with mean q comes closer to Q than a shifted Q. And P/Q is at least 1-q, and at least q times the density of
    N(1) over that of N(0), which says more where noise is low and sampling rare.
    """
    square = 2 * noise_multiplier**2
    rare = sample_rate * (1 / square + math.log(sample_rate))
    if sample_rate < 1:
        rare += (1 - sample_rate) * math.log1p(-sample_rate)
    return max(sample_rate**2 / square, rare)


@lru_cache(maxsize=4)  # a plan is priced alone, then after all that was spent
def _loss_of_steps(step: Step, count: int) -> Any:
    return _loss_of_step(step).self_compose(count)


def _loss_of_step(step: Step) -> Any:
    poisson = _poisson(step.noise_multiplier, step.sample_rate)
    if step.tight == 0:
        return poisson
    return _displacing(step.noise_multiplier, step.sample_rate).compute_mixture(poisson, step.tight)


@lru_cache(maxsize=16)  # few: a run's rounds are made of the same step, and at little noise one takes 10 MB
def _poisson(noise_multiplier: float, sample_rate: float) -> Any:
    return from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=_DISCRETIZATION
    )


@lru_cache(maxsize=16)
def _displacing(noise_multiplier: float, sample_rate: float) -> Any:
    # Half the noise is twice the clip. REPLACE_ONE, as in dp-accounting's event, bounds adding and removing too: it
    # compares (1-q) N(0) + q N(2) with (1-q) N(0) + q N(-2) where they compare it with N(0). In both pairs the ratio
    # of densities rises along the line, so the worst event is a half-line, and there the first pair lies further apart.
    return from_gaussian_mechanism(
        noise_multiplier / 2,
        sampling_prob=sample_rate,
        value_discretization_interval=_DISCRETIZATION,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )


def _tight(release: Release) -> float:
    """P(at least ``max_batch`` of the other users are drawn), for the largest owner."""
    if release.max_batch is None:
        return 0.0
    return _chance_of_more(release.max_batch - 1, release.max_users - 1, release.sample_rate)


@lru_cache(maxsize=1024)
def _chance_of_more(drawn: int, others: int, sample_rate: float) -> float:
    return float(stats.binom.sf(drawn, others, sample_rate))


def _uncapped(releases: Sequence[Release]) -> tuple[Release, ...]:
    return tuple(replace(one, max_batch=None) if isinstance(one, DpSgdRelease) else one for one in releases)


@contextmanager
def _silent_about_orders() -> Iterator[None]:
    """dp-accounting warns of every order it leaves out of the minimum, and leaving one out only raises the bound."""

    def is_worth_it(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(is_worth_it)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_it)
