import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.weighting import (
    NO_MIXING,
    Mixing,
    choose_weight,
    clearly_better,
    default_weight,
    pick_mixing,
    regime,
)
from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.ease import Ease
from shared.recommenders.multvae import MultVae
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
    assert choice.out_of_fold[Mixing(choice.weight, choice.schedule)] > choice.out_of_fold[NO_MIXING]
    assert list(choice.out_of_fold) == [Mixing(weight) for weight in WEIGHTS]
    assert choice.schedule == "constant"


@pytest.mark.parametrize("default", [0.0, 0.1, 1.0])
def test_harmful_synthetic_users_get_none_whatever_the_default(default):
    rng = np.random.default_rng(0)
    relabelled = planted_users(500, rng=rng)
    harmful = Histories(relabelled.indptr, rng.permutation(60).astype(np.int32)[relabelled.items], 60)
    assert choose(planted_users(40, rng=rng), harmful, default=default).weight == 0


def pick(scores, *, default=0.1, seed=0):
    """The weight picked from scores by weight."""
    by_mixing = {Mixing(weight): np.asarray(row, dtype=float) for weight, row in scores.items()}
    return pick_mixing(by_mixing, default=Mixing(default), rng=np.random.default_rng(seed)).weight


NUM_DRAWS = 400


def share_taken(rule, *, num_weights, correlation):
    """How often ``rule`` takes a weight above zero when none changes anything, for 60 users of skewed scores."""
    rng = np.random.default_rng(0)
    taken = 0
    for _ in range(NUM_DRAWS):
        # Differences of two scores of one law: their mean is zero, and so is their skew.
        own, common = (rng.exponential(size=(60, k)) - rng.exponential(size=(60, k)) for k in (num_weights, 1))
        differences = math.sqrt(1 - correlation) * own + math.sqrt(correlation) * common
        taken += rule({0.0: np.zeros(60)} | {0.1 * (w + 1): differences[:, w] for w in range(num_weights)}) > 0
    return taken / NUM_DRAWS


def one_standard_error(scores):
    """Each weight on its own, as if it were the only one."""
    beats = [w for w, row in scores.items() if w and row.mean() > row.std(ddof=1) / math.sqrt(len(row))]
    return max(beats, default=0.0)


@pytest.mark.parametrize(("num_weights", "correlation"), [(1, 0.0), (4, 0.5), (8, 0.9)])
def test_a_weight_that_changes_nothing_is_taken_one_time_in_six(num_weights, correlation):
    # The share of 400 draws is known to sqrt(1/6 × 5/6 / 400) = 0.019; four of those are 0.075.
    tolerance = 4 * math.sqrt(1 / 6 * 5 / 6 / NUM_DRAWS)
    setting = {"num_weights": num_weights, "correlation": correlation}
    assert share_taken(pick, **setting) == pytest.approx(1 / 6, abs=tolerance)
    if num_weights > 1:  # a standard error for each has as many chances to err as there are weights
        assert share_taken(one_standard_error, **setting) > 1 / 6 + tolerance


def test_the_error_rate_is_that_of_all_sign_flips_one_by_one():
    rng = np.random.default_rng(0)
    signs = np.array(list(product((-1, 1), repeat=8)))
    decided = 0
    for _ in range(40):
        differences = rng.normal(0.4, 1.0, size=(8, 3))
        leads = differences.sum(axis=0) / np.linalg.norm(differences, axis=0)
        flipped = (signs @ differences / np.linalg.norm(differences, axis=0)).max(axis=1)
        exact = [(flipped >= lead - 1e-9).mean() for lead in leads]
        scores = {NO_MIXING: np.zeros(8)} | {Mixing(w + 1.0): differences[:, w] for w in range(3)}
        better = clearly_better(scores, than=NO_MIXING, rng=rng)
        for weight, rate in enumerate(exact, start=1):
            if abs(rate - 1 / 6) > 4 * math.sqrt(1 / 6 * 5 / 6 / 2399):  # the error of drawing flips
                assert (Mixing(float(weight)) in better) == (rate < 1 / 6)
                decided += rate < 1 / 6
    assert decided > 10


def test_every_user_counts_where_there_are_thousands():
    # The lead that is seen one time in six is z = 0.967; drawn flips know it to sqrt(5/36 / 2399) / φ(z) = 0.03.
    users = np.random.default_rng(0).standard_normal(3000)
    users /= np.linalg.norm(users)
    for lead, taken in ((0.967 - 0.12, 0.0), (0.967 + 0.12, 0.1)):
        shifted = users + (lead - users.sum()) / 3000
        assert pick({0.0: np.zeros(3000), 0.1: shifted}) == taken


@given(
    means=st.lists(st.floats(-0.3, 0.3), min_size=1, max_size=5),
    num_users=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    default=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_what_is_taken_has_a_better_estimate_than_zero(means, num_users, seed, default):
    rng = np.random.default_rng(seed)
    rows = {float(w + 1): mean + 0.2 * rng.standard_normal(num_users) for w, mean in enumerate(means)}
    zero = 0.2 * rng.standard_normal(num_users)
    taken = pick({0.0: zero} | rows, default=float(default), seed=seed)
    assert taken == 0 or rows[taken].mean() > zero.mean()
    if default in rows and rows[default].mean() <= zero.mean():
        assert taken != default


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
        ({"w0": 1.0, "w0_1": 0.90, "w0_3": 1.10}, 0.1, 0.3),  # the default's estimate is negative: never the default
        ({"w0": 1.0, "w0_1": 0.99, "w0_3": 1.02}, 0.1, 0.0),  # and zero, where no other is trusted
        ({"w0": 1.0, "w0_1": 1.10, "w0_3": 1.12}, 0.0, 0.3),
        ({"w0": 1.0, "w0_1": 0.90, "w0_3": 0.90}, 0.3, 0.0),
    ],
)
def test_the_rule_by_hand(means, default, expected):
    assert pick(per_user(**means), default=default) == expected


def test_the_default_stays_unless_another_weight_is_clearly_better():
    noise = np.tile([-0.5, 0.5], 50)  # one standard error is 0.05, the lead of 0.3 is 0.02
    scores = {0.0: np.zeros(100), 0.1: np.full(100, 0.5), 0.3: 0.52 + noise}
    assert pick(scores, default=0.1) == 0.1
    assert pick(scores, default=0.0) == 0.3


@pytest.mark.parametrize("num_users", [1, 2])
def test_two_users_prove_nothing(num_users):
    assert pick({0.0: np.zeros(num_users), 0.1: np.ones(num_users)}) == 0.0


def test_equal_scores_prove_nothing():
    assert pick({0.0: np.full(50, 0.3), 0.1: np.full(50, 0.3), 0.3: np.full(50, 0.3)}) == 0.0


def test_a_grid_without_zero_is_refused():
    users = planted_users(30, rng=np.random.default_rng(0))
    with pytest.raises(InputError, match="so that augmentation can be declined"):
        choose(users, users, weights=(0.1, 0.3))


class Spy:
    """Writes down what it is asked to train, and has its models write down whom they are shown."""

    name = "spy"
    schedules = ("constant", "fade")

    def __init__(self):
        self.trained, self.shown = [], []

    def variants(self):
        return (self,)

    def fit(self, real, synthetic=None, *, weight=0.0, schedule="constant", seed):
        self.trained.append((weight, schedule))
        shown = self.shown

        class Fitted:
            def scores(self, fold_in):
                for u in range(fold_in.num_users):
                    assert not set(fold_in.row(u)) & set(real.items)
                    shown.append(tuple(fold_in.row(u)))
                return np.zeros((fold_in.num_users, fold_in.num_items), np.float32)

        return Fitted()

    def fit_variants(self, real, synthetic=None, **how):
        yield self.fit(real, synthetic, **how)


LONERS = Histories.from_rows(np.arange(120).reshape(30, 4), 120)  # no item is shared: an item tells its user


def test_out_of_fold_pairs_users_across_weights_and_never_scores_its_own_training_users():
    spies = [Spy(), Spy()]
    for weight, spy in zip((0.0, 0.3), spies, strict=True):
        out_of_fold(spy, LONERS, OutOfFold(seed=1), synthetic=LONERS, weight=weight)
    assert spies[0].shown == spies[1].shown
    assert len(spies[0].shown) == 30


def test_every_weight_is_tried_under_every_schedule_and_zero_once():
    spy = Spy()
    plan = OutOfFold(seed=0, folds=2)
    choice = choose_weight(spy, LONERS, LONERS, weights=(0.0, 0.1), default=0.3, plan=plan)
    tried = [Mixing(0.0), Mixing(0.1), Mixing(0.1, "fade"), Mixing(0.3), Mixing(0.3, "fade")]
    assert spy.trained == [mixing for mixing in tried for _ in range(2)]
    assert list(choice.out_of_fold) == tried


class HelpedByFading(Ease):
    """Learns from synthetic users where they fade, and ignores them where they do not."""

    schedules = ("constant", "fade")

    def fit(self, real, synthetic=None, *, weight=0.0, schedule="constant", seed):
        return super().fit(real, synthetic, weight=weight if schedule == "fade" else 0.0, seed=seed)


def test_the_schedule_that_helps_is_chosen():
    rng = np.random.default_rng(0)
    train, useful = planted_users(40, rng=rng), planted_users(500, rng=rng)
    plan = OutOfFold(seed=0, fold_in_share=0.5)
    choice = choose_weight(HelpedByFading((0.01,)), train, useful, weights=WEIGHTS, default=0.1, plan=plan)
    assert choice.weight > 0
    assert choice.schedule == "fade"


def test_early_stopping_costs_one_training_per_fold(monkeypatch):
    train = planted_users(30, rng=np.random.default_rng(0))
    plan = OutOfFold(seed=0, folds=3, fold_in_share=0.5)
    recommender = MultVae(60, 8, epochs=5, learning_rate=0.02, device=torch.device("cpu"))
    stops, original = [], MultVae._train
    monkeypatch.setattr(MultVae, "_train", lambda *a, **how: stops.append(list(how["stops"])) or original(*a, **how))
    tuned = tune(recommender, train, plan)
    assert stops == [[1, 2, 3, 4, 5]] * 3
    best = out_of_fold(recommender, train, plan).mean(axis=1).argmax()
    assert tuned == recommender.variants()[best]
    assert tuned.stop_after == stops[0][best]
    assert tuned.variants() == (tuned,)


def test_the_tuned_variant_is_the_better_one():
    train = planted_users(60, rng=np.random.default_rng(0))
    plan = OutOfFold(seed=0, fold_in_share=0.5)
    scores = out_of_fold(Ease((0.003, 1000.0)), train, plan).mean(axis=1)
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
