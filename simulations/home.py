"""Let every simulated owner train at home, and compare with what pooling all users would give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from client.home import train_at_home
from shared.config import Scenario
from shared.data.histories import Histories
from shared.metrics.ranking import Ranking, parse_metric, rank
from shared.recommenders.base import Fitted, Recommender
from shared.recommenders.tuning import OutOfFold, tune
from simulations.outcomes import OwnerOutcome
from simulations.owners import OwnerData


@dataclass(frozen=True, slots=True)
class Arms:
    """What the owners compare with local training.

    Args:
        synthetic: by arm, the users drawn from its generator.
        default_weights: by arm, the weight that public numbers suggest.
        central: whether to train on everyone's real users too.
    """

    synthetic: Mapping[str, Histories]
    default_weights: Mapping[str, float]
    central: bool


def train_owners(
    owners: Sequence[OwnerData],
    arms: Arms,
    recommender: Recommender,
    *,
    scenario: Scenario,
    epsilons: Mapping[str, float],
    progress: Callable[[int, int], None],
) -> tuple[OwnerOutcome, ...]:
    """Every owner's rankings under every arm, in the order of ``owners``.

    Guarantee:
        Settings and weights are chosen on training users; test users are ranked once, at the end.
    """
    plan = OutOfFold(
        folds=scenario.augmentation.folds,
        metric=scenario.study.metric,
        fold_in_share=scenario.study.fold_in_share,
        hide="random" if scenario.study.holdout == "users" else "newest",
        seed=scenario.seed,
    )
    pooled = _pooled(owners, recommender, plan) if arms.central else None
    rankings: list[dict[str, Ranking]] = [{} for _ in owners]
    weights: list[dict[str, float]] = [{} for _ in owners]
    schedules: list[dict[str, str]] = [{} for _ in owners]
    done, steps = 0, len(owners) * max(1, len(arms.synthetic))
    # Arm by arm, not owner by owner: what a recommender computes from synthetic users alone serves all owners.
    for arm, synthetic in arms.synthetic.items():
        for position, owner in enumerate(owners):
            result = train_at_home(
                owner.split,
                synthetic,
                recommender,
                weights=scenario.augmentation.weights,
                default=arms.default_weights[arm],
                plan=plan,
            )
            rankings[position] |= {"local": result.local, arm: result.augmented}
            weights[position][arm] = result.choice.weight
            schedules[position][arm] = result.choice.schedule
            progress(done := done + 1, steps)
    for position, owner in enumerate(owners):
        if not arms.synthetic:
            tuned = tune(recommender, owner.split.train, plan)
            rankings[position]["local"] = _rank(tuned.fit(owner.split.train, seed=plan.seed), owner, plan)
            progress(done := done + 1, steps)
        if pooled is not None:
            rankings[position]["central"] = _rank(pooled, owner, plan)
    return tuple(
        OwnerOutcome(
            name=owner.name,
            num_users=owner.num_users,
            epsilon=epsilons[owner.name],
            chosen_weight=weights[position],
            chosen_schedule=schedules[position],
            per_user={arm: ranking.metric(plan.metric) for arm, ranking in rankings[position].items()},
            coverage={arm: ranking.coverage for arm, ranking in rankings[position].items()},
        )
        for position, owner in enumerate(owners)
    )


def _pooled(owners: Sequence[OwnerData], recommender: Recommender, plan: OutOfFold) -> Fitted:
    everyone = Histories.concatenate([owner.split.train for owner in owners])
    return tune(recommender, everyone, plan).fit(everyone, seed=plan.seed)


def _rank(fitted: Fitted, owner: OwnerData, plan: OutOfFold) -> Ranking:
    _, k = parse_metric(plan.metric)
    return rank(fitted, owner.split.fold_in, owner.split.targets, k=k)
