import json

import numpy as np
import pytest

from shared.errors import InputError
from simulations.outcomes import OwnerOutcome, SeedOutcome
from simulations.statistics import paired_bootstrap
from simulations.study import arms_table, collect, owners_table, verdict


def owner(name, *, epsilon=7.5, weight=0.1, **per_user):
    values = {arm: np.asarray(row, dtype=float) for arm, row in per_user.items()}
    return OwnerOutcome(
        name, 100, epsilon, {"federated": weight}, {"federated": "constant"}, values, dict.fromkeys(values, 0.5)
    )


def drawn(seed, *, gain=0.02, spread=0.05, num_users=80, gap=0.1, weight=0.1):
    """Two owners whose users differ much and whose gains differ little."""
    rng = np.random.default_rng(seed)
    owners = []
    for name, level in (("a", 0.3), ("b", 0.5)):
        local = level + 0.15 * rng.standard_normal(num_users)
        federated = local + gain + spread * rng.standard_normal(num_users)
        owners.append(owner(name, weight=weight, local=local, federated=federated, central=local + gap))
    return SeedOutcome(seed, tuple(owners), 1.0)


def bootstrap(outcomes, num_resamples=2000):
    return paired_bootstrap(outcomes, num_resamples=num_resamples, rng=np.random.default_rng(0))


def study(outcomes, **changes):
    options = {"metric": "ndcg@20", "epsilon": 8.0, "delta": 1e-5, "num_resamples": 500, "peak_rss_mib": 1.0}
    return collect(outcomes, **{**options, **changes})


def test_means_are_over_users_of_a_seed_then_over_seeds():
    first = SeedOutcome(0, (owner("a", local=[0.1]), owner("b", local=[0.4, 0.4, 0.4, 0.7])), 1.0)
    second = SeedOutcome(1, (owner("a", local=[1.0]),), 1.0)
    assert bootstrap([first, second]).measured["local"] == pytest.approx((2.0 / 5 + 1.0) / 2)


def test_an_interval_of_a_mean_has_the_width_that_theory_gives():
    # One owner, one seed: the standard error is s / √n, and the interval ± 1.96 of it. A quantile of 4,000 resamples is
    # known to about 4 %; 10 % is generous, and half the width or double would be caught.
    values = np.random.default_rng(0).standard_normal(400)
    mean = bootstrap([SeedOutcome(0, (owner("a", local=values),), 1.0)], 4000).mean("local")
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_pairing_sees_a_gain_that_is_small_against_the_spread_of_users():
    means = bootstrap([drawn(0)])
    difference = means.difference("federated", "local")
    assert difference.low > 0
    assert means.mean("federated").low < means.mean("local").high  # unpaired intervals overlap


def test_users_are_resampled_inside_their_owner():
    # Owners differ, users of one owner do not: nothing is uncertain.
    outcome = SeedOutcome(0, (owner("a", local=[0.2] * 9), owner("b", local=[0.8] * 9)), 1.0)
    mean = bootstrap([outcome]).mean("local")
    assert (mean.low, mean.high) == pytest.approx((0.5, 0.5))


def test_differences_between_seeds_widen_the_interval():
    def shifted(seed, shift):
        return SeedOutcome(seed, (owner("a", local=np.full(50, 0.4 + shift)),), 1.0)

    alike = bootstrap([shifted(0, 0.0), shifted(1, 0.0), shifted(2, 0.0)]).mean("local")
    apart = bootstrap([shifted(0, -0.1), shifted(1, 0.0), shifted(2, 0.1)]).mean("local")
    assert alike.high - alike.low == pytest.approx(0)
    assert apart.low < 0.35 < 0.45 < apart.high


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    # 300 studies of three seeds with a true gain of 0.02. 95 % ± four standard errors of 1.26 % is 90 to 100 %.
    covered = [
        estimate.low <= 0.02 <= estimate.high
        for study_number in range(300)
        for estimate in [
            bootstrap([drawn(3 * study_number + s) for s in range(3)], 400).difference("federated", "local")
        ]
    ]
    assert np.mean(covered) >= 0.90


def test_lift_and_gap_closed_by_hand():
    outcome = SeedOutcome(0, (owner("a", local=[0.4] * 5, federated=[0.42] * 5, central=[0.5] * 5),), 1.0)
    lift = study([outcome])["lift"]
    assert lift["federated"]["relative"] == pytest.approx(0.05)
    assert lift["federated"]["ci95"] == pytest.approx([0.05, 0.05])
    assert lift["federated"]["gap_closed"] == pytest.approx(0.2)
    assert lift["central"]["gap_closed"] == pytest.approx(1.0)


def test_there_is_no_gap_to_close_where_pooling_brings_no_clear_gain():
    for gap in (0.0, -0.05):
        assert study([drawn(0, gap=gap)])["lift"]["federated"]["gap_closed"] is None


def test_a_baseline_of_zero_has_no_lift():
    outcome = SeedOutcome(0, (owner("a", local=[0.0] * 5, federated=[0.1] * 5),), 1.0)
    assert study([outcome])["lift"]["federated"]["relative"] is None
    arms_table(study([outcome]))


def test_study_json_has_what_scripts_rely_on():
    result = study([drawn(0), drawn(1)], epsilon=float("inf"))
    json.dumps(result, allow_nan=False)
    assert result["epsilon"] == "inf"
    assert result["privacy_unit"] == "user"
    assert result["seeds"] == [0, 1]
    assert set(result["arms"]) == {"local", "federated", "central"}
    low, high = result["arms"]["local"]["ci95"]
    assert low <= result["arms"]["local"]["mean"] <= high
    assert [entry["name"] for entry in result["owners"]] == ["a", "b"]
    assert result["owners"][0]["chosen_weight"] == pytest.approx(0.1)
    assert result["seconds"] == 2.0
    assert result == study([drawn(0), drawn(1)], epsilon=float("inf"))


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (drawn(0, gain=0.02), "Augmentation helped: NDCG@20 +"),
        (drawn(0, gain=-0.02), "Augmentation hurt: NDCG@20 −"),
        (drawn(0, gain=0.0, spread=0.1), "No clear effect"),
        (drawn(0, gain=0.0, weight=0.0), "Every owner declined"),
    ],
)
def test_the_verdict_says_what_happened(outcome, said):
    result = study([outcome])
    assert verdict(result).startswith(said)
    owners_table(result)
    arms_table(result)


def test_seeds_with_different_arms_are_refused():
    other = SeedOutcome(1, (owner("a", local=[0.1, 0.2]),), 1.0)
    with pytest.raises(InputError, match="Run all seeds with the same"):
        bootstrap([drawn(0), other])
    with pytest.raises(InputError, match="Run the study first"):
        bootstrap([])


def test_arms_must_score_the_same_users():
    with pytest.raises(InputError, match="the same test users"):
        owner("a", local=[0.1, 0.2], federated=[0.1])


def test_an_outcome_survives_the_disk(tmp_path):
    path = tmp_path / "outcome.json"
    before = drawn(4)
    before.save(path)
    after = SeedOutcome.load(path)
    assert (after.seed, after.seconds) == (before.seed, before.seconds)
    for old, new in zip(before.owners, after.owners, strict=True):
        assert (old.name, old.num_users, old.epsilon) == (new.name, new.num_users, new.epsilon)
        assert old.chosen_weight == new.chosen_weight
        assert old.coverage == new.coverage
        for arm in old.per_user:
            np.testing.assert_array_equal(old.per_user[arm], new.per_user[arm])
    assert json.loads(path.read_text())["simulation_only"] is True
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{}", '{"seed": 0, "owners": 3, "seconds": 1}'])
def test_half_an_outcome_is_refused(tmp_path, content):
    path = tmp_path / "outcome.json"
    path.write_text(content)
    with pytest.raises(InputError, match="Delete it to run that seed again"):
        SeedOutcome.load(path)
