"""Score recommenders on users they were not trained on, so that settings are chosen without test users."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.data.splits import assert_users_disjoint, show_part
from shared.errors import InputError
from shared.metrics.ranking import parse_metric, rank
from shared.recommenders.base import Recommender, Schedule
from shared.rng import stream

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfFold:
    """How training users are turned into validation users.

    Args:
        folds: parts of the training users; each is scored by a model of the others.
        metric: ``ndcg@K`` or ``recall@K``.
        fold_in_share: share of a validation user's items that the model is shown.
        hide: random items or the newest, as the test will.
        seed: of the folds, of the fold-ins and of the models.
    """

    folds: int = 3
    metric: str = "ndcg@20"
    fold_in_share: float = 0.8
    hide: Literal["random", "newest"] = "random"
    seed: int


def out_of_fold(
    recommender: Recommender,
    train: Histories,
    plan: OutOfFold,
    *,
    synthetic: Histories | None = None,
    weight: float = 0.0,
    schedule: Schedule = "constant",
) -> FloatArray:
    """The metric of every training user under every variant of ``recommender``, trained on the other folds' users.

    Returns:
        shape ``(num_variants, num_scored_users)``: one plan scores the same users on the same targets whatever
        the recommender and the weight, so that differences are paired. Users with one item cannot be split; they
        train only.
    Guarantee:
        A function of ``train`` and ``synthetic`` alone: other users of the owner, such as test users, are not here.
    Raises:
        InputError: too few users have two items or more.
    """
    _, k = parse_metric(plan.metric)
    order = stream(plan.seed, "out-of-fold", "users").permutation(train.num_users)
    fold_of = np.empty(train.num_users, dtype=np.int64)
    fold_of[order] = np.arange(train.num_users) % plan.folds
    splittable = train.lengths() >= 2
    if min((splittable & (fold_of == fold)).sum() for fold in range(plan.folds)) == 0:
        raise InputError(
            f"{int(splittable.sum())} training user(s) with two items or more are too few for {plan.folds} folds."
            " Lower augmentation.folds, or give this owner more users."
        )
    columns = []
    for fold in range(plan.folds):
        taught, scored = np.flatnonzero(fold_of != fold), np.flatnonzero(splittable & (fold_of == fold))
        assert_users_disjoint(taught, scored)
        rng = stream(plan.seed, "out-of-fold", "targets", fold) if plan.hide == "random" else None
        fold_in, targets = show_part(train.select(scored), plan.fold_in_share, rng=rng)
        models = recommender.fit_variants(
            train.select(taught), synthetic, weight=weight, schedule=schedule, seed=plan.seed
        )
        columns.append(np.stack([rank(fitted, fold_in, targets, k=k).metric(plan.metric) for fitted in models]))
    return np.concatenate(columns, axis=1)


def tune(recommender: Recommender, train: Histories, plan: OutOfFold) -> Recommender:
    """The variant with the best mean out-of-fold score on ``train`` alone; the first of equals."""
    variants = recommender.variants()
    if len(variants) == 1:
        return variants[0]
    return variants[int(out_of_fold(recommender, train, plan).mean(axis=1).argmax())]
