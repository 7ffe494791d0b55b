"""Train an owner's recommender with and without synthetic users, choosing on its training users alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.augmentation.weighting import WeightChoice, choose_weight
from shared.data.histories import Histories
from shared.data.splits import Split
from shared.errors import LeakError
from shared.metrics.ranking import Ranking, parse_metric, rank
from shared.recommenders.base import Fitted, Recommender
from shared.recommenders.tuning import OutOfFold


@dataclass(frozen=True, slots=True, eq=False)
class HomeModels:
    """What one owner trained, before anybody is tested: no choice is left.

    Args:
        train: the users that all of it was learned from, besides synthetic ones.
        choice: the weight, the schedule and their out-of-fold scores.
        local: trained on real users only, tuned.
        augmented: trained with synthetic users as chosen; ``local`` itself where the weight is 0.
    """

    train: Histories
    choice: WeightChoice
    local: Fitted
    augmented: Fitted


@dataclass(frozen=True, slots=True, eq=False)
class HomeResult:
    """What one owner learned at home. Private: it stays there, unless this is a simulation.

    Args:
        choice: the weight, the schedule and their out-of-fold scores.
        local: test users ranked by the tuned recommender of real users only.
        augmented: the same users ranked with synthetic users as chosen; ``local`` itself where the weight is 0.
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
    """Choose and train by :func:`train_models`, which is not given the test users; then rank them.

    Guarantee:
        ``split.fold_in`` and ``split.targets`` are read only after every choice is made and every model is trained.
    """
    models = train_models(split.train, synthetic, recommender, weights=weights, default=default, plan=plan)
    return rank_models(models, split, metric=plan.metric)


def train_models(
    train: Histories,
    synthetic: Histories,
    recommender: Recommender,
    *,
    weights: Sequence[float],
    default: float,
    plan: OutOfFold,
) -> HomeModels:
    """Choose the weight and the schedule out of fold, then train on all of ``train``.

    Args:
        train: training users only.
        weights, default: see :func:`~shared.augmentation.weighting.choose_weight`.
    """
    choice = choose_weight(recommender, train, synthetic, weights=weights, default=default, plan=plan)
    local = choice.local.fit(train, seed=plan.seed)
    if choice.weight == 0:
        return HomeModels(train, choice, local, local)
    augmented = choice.recommender.fit(train, synthetic, weight=choice.weight, schedule=choice.schedule, seed=plan.seed)
    return HomeModels(train, choice, local, augmented)


def rank_models(models: HomeModels, split: Split, *, metric: str) -> HomeResult:
    """Rank the test users of ``split`` by ``models``, to the length that ``metric`` asks for.

    Raises:
        LeakError: the models learned from other users than the training users of ``split``.
    """
    if models.train is not split.train:
        raise LeakError(
            "these models were trained on other histories than the training users of this split, perhaps on its test"
            " users. Train them on split.train."
        )
    _, k = parse_metric(metric)
    local = rank(models.local, split.fold_in, split.targets, k=k)
    if models.augmented is models.local:
        return HomeResult(models.choice, local, local)
    return HomeResult(models.choice, local, rank(models.augmented, split.fold_in, split.targets, k=k))
