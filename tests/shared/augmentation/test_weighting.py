import math

import numpy as np
import pytest

from shared.augmentation.weighting import choose_weight, default_weight, pick_weight, regime
from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.ease import Ease
from shared.recommenders.tuning import OutOfFold, out_of_fold, tune
from tests.shared.recommenders.planted import planted_users

WEIGHTS = (0.0, 0.1, 0.3, 1.0)
RECOMMENDER = Ease((0.003, 0.03))


def choose(train, synthetic, *, default=0.1, seed=0, weights=WEIGHTS):
    return choose_weight(
        RECOMMENDER, train, synthetic, weights=weights, default=default, plan=OutOfFold(seed=seed, fold_in_share=0.5)
    )


def test_useful_synthetic_users_get_a_weight():
    rng = np.random.default_rng(0)
    choice = choose(planted_users(40, rng=rng), planted_users(500, rng=rng))
    assert choice.weight > 0
    assert choice.out_of_fold[choice.weight] > choice.out_of_fold[0.0]
    assert set(choice.out_of_fold) == set(WEIGHTS)


@pytest.mark.parametrize("default", [0.0, 0.1, 1.0])
def test_harmful_synthetic_users_get_none_whatever_the_default(default):
    rng = np.random.default_rng(0)
    relabelled = planted_users(500, rng=rng)
    harmful = Histories(relabelled.indptr, rng.permutation(60).astype(np.int32)[relabelled.items], 60)
    assert choose(planted_users(40, rng=rng), harmful, default=default).weight == 0


def test_a_weight_that_changes_nothing_is_taken_one_time_in_six():
    # P(z > 1) = 0.159; the share of 2,000 draws is known to 0.008, four of those are 0.033. Taking whatever looks
    # better, without the standard error, would be one in two.
    rng = np.random.default_rng(0)
    zero = np.zeros(100)
    taken = [pick_weight({0.0: zero, 0.1: rng.standard_normal(100)}, default=0.1) > 0 for _ in range(2000)]
    assert np.mean(taken) == pytest.approx(0.159, abs=0.033)


def per_user(**means):
    # Differences between weights have standard deviation 1/2 and 100 users: one standard error is 0.05.
    noise = np.tile([-0.5, 0.5], 50)
    return {float(w.lstrip("w").replace("_", ".")): m + (0 if w == "w0" else 1) * noise for w, m in means.items()}


@pytest.mark.parametrize(
    ("means", "default", "expected"),
    [
        ({"w0": 1.0, "w0_1": 1.04, "w0_3": 1.02}, 0.1, 0.0),  # nobody beats zero by a standard error
        ({"w0": 1.0, "w0_1": 1.10, "w0_3": 1.12}, 0.1, 0.3),  # equal noise in both: their difference is exact
        ({"w0": 1.0, "w0_1": 1.10, "w0_3": 1.10}, 0.1, 0.1),
        ({"w0": 1.0, "w0_1": 0.90, "w0_3": 1.10}, 0.1, 0.3),  # an untrusted default is no anchor
        ({"w0": 1.0, "w0_1": 1.10, "w0_3": 1.12}, 0.0, 0.3),
        ({"w0": 1.0, "w0_1": 0.90, "w0_3": 0.90}, 0.3, 0.0),
    ],
)
def test_the_rule_by_hand(means, default, expected):
    assert pick_weight(per_user(**means), default=default) == expected


def test_the_default_stays_unless_another_weight_is_clearly_better():
    noise = np.tile([-0.5, 0.5], 50)  # one standard error is 0.05, the lead of 0.3 is 0.02
    scores = {0.0: np.zeros(100), 0.1: np.full(100, 0.5), 0.3: 0.52 + noise}
    assert pick_weight(scores, default=0.1) == 0.1
    assert pick_weight(scores, default=0.0) == 0.3


def test_one_user_proves_nothing():
    assert pick_weight({0.0: np.array([0.0]), 0.1: np.array([1.0])}, default=0.1) == 0.0


def test_a_grid_without_zero_is_refused():
    users = planted_users(30, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="so that augmentation can be declined"):
        choose(users, users, weights=(0.1, 0.3))


def test_out_of_fold_pairs_users_across_weights_and_never_scores_its_own_training_users():
    train = Histories.from_rows(np.arange(120).reshape(30, 4), 120)  # no item is shared: an item tells its user
    asked = []

    class Spy:
        name = "spy"

        def variants(self):
            return (self,)

        def fit(self, real, synthetic=None, *, weight=0.0, seed):
            class Fitted:
                def scores(self, fold_in):
                    for u in range(fold_in.num_users):
                        assert not set(fold_in.row(u)) & set(real.items)
                        asked[-1].append(tuple(fold_in.row(u)))
                    return np.zeros((fold_in.num_users, fold_in.num_items), np.float32)

            return Fitted()

    for weight in (0.0, 0.3):
        asked.append([])
        out_of_fold([Spy()], train, OutOfFold(seed=1), synthetic=train, weight=weight)
    assert asked[0] == asked[1]
    assert len(asked[0]) == 30


def test_the_tuned_variant_is_the_better_one():
    train = planted_users(60, rng=np.random.default_rng(0))
    plan = OutOfFold(seed=0, fold_in_share=0.5)
    scores = out_of_fold(Ease((0.003, 1000.0)).variants(), train, plan).mean(axis=1)
    for grid in ((0.003, 1000.0), (1000.0, 0.003)):
        assert tune(Ease(grid), train, plan).l2 == ((0.003,) if scores[0] > scores[1] else (1000.0,))


def test_too_few_users_for_the_folds():
    with pytest.raises(InputError, match=r"Lower augmentation\.folds"):
        tune(Ease((0.1, 0.2)), Histories.from_rows([[0, 1], [1, 2], [3]], 5), OutOfFold(seed=0))


@pytest.mark.parametrize(
    ("users_times_epsilon", "name", "weight"),
    [
        (4_999, "noise wins", 0.0),
        (5_000, "some signal", 0.1),
        (99_999, "some signal", 0.1),
        (100_000, "plenty of signal", 0.3),
        (math.inf, "no privacy", 0.3),
    ],
)
def test_regimes(users_times_epsilon, name, weight):
    for num_owners in (1, 25):  # noise at each of 25 owners costs a factor of five
        scaled = users_times_epsilon * math.sqrt(num_owners)
        assert regime(scaled, num_owners).name == name
        assert default_weight(scaled, num_owners) == weight
        if not math.isinf(scaled):
            assert "one data set" in regime(scaled, num_owners).sentence
