import numpy as np

from client.home import train_at_home
from shared.data.splits import Split
from shared.recommenders.ease import Ease
from shared.recommenders.tuning import OutOfFold
from tests.shared.recommenders.planted import planted_split, planted_users

PLAN = OutOfFold(seed=0, fold_in_share=0.5)


def at_home(split, synthetic):
    return train_at_home(split, synthetic, Ease((0.003, 0.03)), weights=(0, 0.1, 0.3, 1.0), default=0.1, plan=PLAN)


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


def test_test_users_have_no_say_in_any_choice():
    rng = np.random.default_rng(0)
    split, synthetic = planted_split(60, rng=rng), planted_users(300, rng=rng)
    other = planted_split(60, rng=np.random.default_rng(9))
    first, second = at_home(split, synthetic), at_home(Split(split.train, other.fold_in, other.targets), synthetic)
    assert first.choice.weight == second.choice.weight
    assert first.choice.out_of_fold == second.choice.out_of_fold
    assert first.local.ndcg.tolist() != second.local.ndcg.tolist()
