"""Train an owner's recommender with and without synthetic users, choosing on its training users alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.augmentation.weighting import WeightChoice, choose_weight
from shared.data.histories import Histories
from shared.data.splits import Split
from shared.metrics.ranking import Ranking, parse_metric, rank
from shared.recommenders.base import Recommender
from shared.recommenders.tuning import OutOfFold


@dataclass(frozen=True, slots=True, eq=False)
class HomeResult:
    """What one owner learned at home. Private: it stays there, unless this is a simulation.

    Args:
        choice: the weight and its out-of-fold scores.
        local: test users ranked by the tuned recommender of real users only.
        augmented: the same users ranked with synthetic users at the chosen weight; ``local`` itself where that is 0.
    """

    choice: WeightChoice
    local: Ranking
    augmented: Ranking


def train_at_home(
    split: Split,
    synthetic: Histories,
    recommender: Recommender,
    *,
    weights: Sequence[float],
    default: float,
    plan: OutOfFold,
) -> HomeResult:
    """Choose the weight out of fold, train on all training users, rank the test users.

    Guarantee:
        ``split.fold_in`` and ``split.targets`` are read only after every choice is made.
    """
    choice = choose_weight(recommender, split.train, synthetic, weights=weights, default=default, plan=plan)
    _, k = parse_metric(plan.metric)
    fitted = choice.local.fit(split.train, seed=plan.seed)
    local = rank(fitted, split.fold_in, split.targets, k=k)
    if choice.weight == 0:
        return HomeResult(choice, local, local)
    fitted = choice.recommender.fit(split.train, synthetic, weight=choice.weight, seed=plan.seed)
    return HomeResult(choice, local, rank(fitted, split.fold_in, split.targets, k=k))
