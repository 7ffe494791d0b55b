from typing import ClassVar

import numpy as np
import pytest

from client.home import HomeResult, rank_models, train_at_home, train_models
from shared.augmentation.weighting import choose_weight
from shared.data.histories import Histories
from shared.data.splits import Split
from shared.errors import LeakError
from shared.metrics.ranking import rank
from shared.recommenders.ease import Ease
from shared.recommenders.tuning import OutOfFold
from tests.shared.recommenders.planted import planted_split, planted_users

PLAN = OutOfFold(seed=0, fold_in_share=0.5)
TERMS = {"weights": (0, 0.1, 0.3, 1.0), "default": 0.1, "plan": PLAN}


def at_home(split, synthetic):
    return train_at_home(split, synthetic, Ease((0.003, 0.03)), **TERMS)


def test_useful_synthetic_users_raise_the_held_out_score():
    rng = np.random.default_rng(0)
    result = at_home(planted_split(60, rng=rng), planted_users(1000, rng=rng))
    assert result.choice.weight > 0
    assert result.augmented.ndcg.mean() > result.local.ndcg.mean()
    assert result.augmented.ndcg.shape == result.local.ndcg.shape == (18,)


def test_where_zero_is_chosen_augmented_is_local():
    rng = np.random.default_rng(0)
    split, junk = planted_split(60, rng=rng), planted_users(500, loyalty=0.0, rng=rng)
    result = at_home(split, junk)
    assert result.choice.weight == 0
    assert result.augmented is result.local


class Watched(Histories):
    """Test users who write down every look at them."""

    events: ClassVar[list] = []

    def __getattribute__(self, name):
        if name in ("indptr", "items", "timestamps", "behaviours"):
            Watched.events.append("read")
        return super().__getattribute__(name)


class WatchedEase(Ease):
    """Writes down every training."""

    def fit(self, real, synthetic=None, **how):
        Watched.events.append("trained")
        return super().fit(real, synthetic, **how)


def leaks(train):
    """What ``train`` does that would let test users into a model or a choice."""
    rng = np.random.default_rng(0)
    split, synthetic = planted_split(60, rng=rng), planted_users(300, rng=rng)
    other = planted_split(60, rng=np.random.default_rng(9))
    choices, found = [], set()
    for tested in (split, other):
        fold_in, targets = (
            Watched(part.indptr, part.items, part.num_items) for part in (tested.fold_in, tested.targets)
        )
        watched = Split(split.train, fold_in, targets)
        Watched.events = events = []
        result = train(watched, synthetic, WatchedEase((0.003, 0.03)), **TERMS)
        assert "read" in events
        if "trained" in events[events.index("read") :]:
            found.add("trained after test users were read")
        choices.append((result.choice.weight, result.choice.schedule, result.choice.out_of_fold))
        local = result.choice.local.fit(split.train, seed=0)
        if not np.array_equal(rank(local, tested.fold_in, tested.targets).ndcg, result.local.ndcg):
            found.add("the local model is not that of the training users")
    if choices[0] != choices[1]:
        found.add("other test users, another choice")
    return found


def test_test_users_have_no_say_in_any_choice():
    assert leaks(train_at_home) == set()


def _with_train(split, train):
    return Split(train, split.fold_in, split.targets)


def chooses_on_test_users(split, synthetic, recommender, **terms):
    choice = choose_weight(recommender, split.fold_in, synthetic, **terms)
    local = choice.local.fit(split.train, seed=0)
    return HomeResult(choice, *(rank(local, split.fold_in, split.targets) for _ in range(2)))


def trains_on_test_users(split, synthetic, recommender, **terms):
    more = Histories.concatenate([split.train, split.fold_in])
    return train_at_home(_with_train(split, more), synthetic, recommender, **terms)


def keeps_the_better_on_test_users(split, synthetic, recommender, *, weights, default, plan):
    # Every model is trained before anybody is tested, so the order of events alone does not give this one away.
    choice = choose_weight(recommender, split.train, synthetic, weights=weights, default=default, plan=plan)
    models = {w: choice.local.fit(split.train, synthetic, weight=w, seed=0) for w in weights}
    rankings = {w: rank(model, split.fold_in, split.targets) for w, model in models.items()}
    best = max(rankings, key=lambda w: rankings[w].ndcg.mean())
    means = {w: float(ranking.ndcg.mean()) for w, ranking in rankings.items()}
    return HomeResult(type(choice)(best, "constant", choice.local, choice.local, means), rankings[0], rankings[best])


@pytest.mark.parametrize("mutant", [chooses_on_test_users, trains_on_test_users, keeps_the_better_on_test_users])
def test_a_leak_is_noticed(mutant):
    assert leaks(mutant)


def test_models_of_other_users_are_not_ranked():
    rng = np.random.default_rng(0)
    split, synthetic = planted_split(60, rng=rng), planted_users(300, rng=rng)
    everyone = Histories.concatenate([split.train, split.fold_in])
    models = train_models(everyone, synthetic, Ease((0.003,)), **TERMS)
    with pytest.raises(LeakError, match=r"Train them on split\.train"):
        rank_models(models, split, metric="ndcg@20")
