"""What a run will cost, from public numbers alone, before anything runs."""

import math
from dataclasses import dataclass, replace
from typing import Any

from shared.config import Scenario
from shared.errors import InputError
from shared.privacy.accounting import certified_epsilon, default_delta
from shared.privacy.calibration import calibrate, calibrate_statistics, default_max_batch
from shared.privacy.releases import DpSgdRelease
from shared.sketch.statistic import plan_sketches, relative_noise
from shared.sketch.terms import SketchTerms
from shared.wire.plan import RoundPlan
from simulations.generator import needs_sketch, trains
from simulations.owners import Federation

# Of epsilon, where the scenario does not say. Gaussian mechanisms compose by the squares of their noise: half of
# epsilon for a sketch leaves training with 15 % more noise than all of it would (epsilon 8, 100 steps at rate 0.2).
_SKETCH_SHARE, _POPULARITY_SHARE = 0.5, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The public numbers of a run and the release they buy.

    Args:
        declared_users: public total of users of the federation; sets delta.
        max_users: public bound on the users of one owner; sets the normaliser.
        sketches: what the first rounds ask for, each with its release where epsilon is finite.
        release: all steps of the run as one release; None where epsilon is infinite or nothing is trained.
        epsilon: what all of it costs every owner; infinity without privacy.
        sources: where each public number came from.
    """

    num_owners: int
    declared_users: int
    max_users: int
    delta: float
    epsilon: float
    sketches: tuple[SketchTerms, ...]
    release: DpSgdRelease | None
    sources: dict[str, str]

    @property
    def is_private(self) -> bool:
        """Whether the run adds noise at all."""
        return math.isfinite(self.epsilon)

    @property
    def users_times_epsilon(self) -> float:
        """N·ε, which with the number of owners tells what noise leaves to be learnt."""
        return self.declared_users * self.epsilon

    def in_words(self) -> list[str]:
        """Each release that the price is of."""
        parts = [
            f"the statistic {sketch.statistic!r} with noise multiplier {sketch.release.noise_multiplier:g}"
            for sketch in self.sketches
            if sketch.release is not None
        ]
        if self.release is not None:
            parts.append(
                f"{self.release.num_steps} steps with noise multiplier {self.release.noise_multiplier:g} at sample rate"
                f" {self.release.sample_rate:g}"
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_owners": self.num_owners,
            "declared_users": self.declared_users,
            "max_users": self.max_users,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "sketches": [sketch.to_dict() for sketch in self.sketches],
            "release": self.release.to_dict() if self.release else None,
            "sources": self.sources,
        }


def price_of(scenario: Scenario, federation: Federation) -> Price:
    """Calibrate the noise of ``scenario`` for its target epsilon.

    A public number that the scenario leaves open is taken from the simulated data, rounded up to
    two digits, and its source then says so: a real federation declares it.

    Raises:
        InputError: a declared number is smaller than the data, or delta is too large to protect anyone.
    """
    total = sum(owner.num_users for owner in federation.owners)
    largest = max(owner.split.train.num_users for owner in federation.owners)
    declared, max_users = scenario.federation.declared_users, scenario.privacy.max_users
    if max_users is not None and max_users < largest:
        raise InputError(
            f"privacy.max_users is {max_users}, but an owner trains on more users than that."
            " Declare a larger bound; it must hold for every owner."
        )
    if declared is not None and declared < total:
        raise InputError(
            f"federation.declared_users is {declared}, fewer than the users simulated."
            " Declare at least their total, or leave it out."
        )
    sources = {
        "declared_users": "assumed public" if declared is None else "scenario",
        "max_users": "assumed public" if max_users is None else "scenario",
    }
    declared = declared or _round_up(total)
    max_users = max_users or _round_up(largest)
    delta = scenario.privacy.delta or default_delta(declared)
    if delta > default_delta(declared):
        raise InputError(
            f"privacy.delta is {delta:g}. At one over the {declared} declared users one user's history could be"
            f" published whole, and it must lie well below. Use at most {default_delta(declared):.3g} (the default)."
        )
    sketches = _sketches(scenario, federation.catalogue.num_items, delta=delta, max_users=max_users)
    release = _training(scenario, sketches, delta=delta, max_users=max_users)
    releases = [r for r in (*(sketch.release for sketch in sketches), release) if r is not None]
    return Price(
        num_owners=len(federation.owners),
        declared_users=declared,
        max_users=max_users,
        delta=delta,
        epsilon=certified_epsilon(releases, delta) if releases else math.inf,
        sketches=sketches,
        release=release,
        sources=sources,
    )


def _sketches(scenario: Scenario, num_items: int, *, delta: float, max_users: int) -> tuple[SketchTerms, ...]:
    """The releases of statistics that the generator begins from; none where it begins from chance."""
    if not needs_sketch(scenario.generator):
        return ()
    planned = plan_sketches(num_items, head_items=scenario.generator.head_items)
    popularity_alone = trains(scenario.generator) and scenario.generator.warm_start == "popularity"
    if popularity_alone:
        planned = (replace(planned[0], statistic="popularity"),)
    if math.isinf(scenario.privacy.epsilon):
        return planned
    share = scenario.privacy.sketch_share or (_POPULARITY_SHARE if popularity_alone else _SKETCH_SHARE)
    if not trains(scenario.generator):
        share = 1.0
    releases = calibrate_statistics(
        {terms.statistic: relative_noise(terms) for terms in planned},
        target_epsilon=share * scenario.privacy.epsilon,
        delta=delta,
        max_users=max_users,
    )
    return tuple(replace(terms, release=release) for terms, release in zip(planned, releases, strict=True))


def _training(
    scenario: Scenario, sketches: tuple[SketchTerms, ...], *, delta: float, max_users: int
) -> DpSgdRelease | None:
    """The least noise for all steps of training that what the sketches leave of epsilon allows."""
    if math.isinf(scenario.privacy.epsilon) or not trains(scenario.generator):
        return None
    rate, steps = scenario.privacy.sample_rate, scenario.federation.rounds * scenario.federation.local_steps
    cap = scenario.privacy.max_batch or default_max_batch(
        max_users=max_users, sample_rate=rate, num_steps=steps, delta=delta
    )
    return calibrate(
        target_epsilon=scenario.privacy.epsilon,
        delta=delta,
        sample_rate=rate,
        num_steps=steps,
        max_users=max_users,
        max_batch=min(max_users, cap),
        beside=[sketch.release for sketch in sketches if sketch.release is not None],
    )


def first_round(scenario: Scenario, price: Price, *, private: bool) -> RoundPlan:
    """The plan of round 1; later rounds differ in ``server_round`` alone."""
    section = scenario.federation
    release = replace(price.release, num_steps=section.local_steps) if private and price.release else None
    sketches = price.sketches if private else tuple(replace(sketch, release=None) for sketch in price.sketches)
    return RoundPlan(
        server_round=1,
        num_rounds=len(sketches) + (section.rounds if trains(scenario.generator) else 0),
        num_owners=price.num_owners,
        num_steps=section.local_steps,
        sample_rate=scenario.privacy.sample_rate,
        max_users=price.max_users,
        max_grad_norm=scenario.privacy.max_grad_norm,
        learning_rate=section.client_learning_rate,
        proximal_mu=section.proximal_mu if section.strategy == "fedprox" else 0.0,
        release=release,
        sketches=sketches,
    )


def _round_up(number: int) -> int:
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit
