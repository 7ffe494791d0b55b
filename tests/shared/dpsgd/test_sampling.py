"""Who is drawn: Poisson at the promised rate, and under a cap a uniformly random subset."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from shared.dpsgd.chance import Chance
from shared.dpsgd.sampling import draw_users
from shared.errors import InputError

NUM_USERS, NUM_STEPS = 200, 2000


def batches(chance: Chance, *, sample_rate: float = 0.1, max_batch: int | None = None) -> npt.NDArray[np.bool_]:
    """Who was drawn in which step, shape ``(NUM_STEPS, NUM_USERS)``."""
    drawn = np.zeros((NUM_STEPS, NUM_USERS), dtype=bool)
    for step in drawn:
        plan = {"sample_rate": sample_rate, "max_batch": max_batch, "max_users": NUM_USERS}
        step[draw_users(NUM_USERS, **plan, chance=chance)] = True
    return drawn


def first_of_those_drawn(chance: Chance, *, sample_rate: float, max_batch: int) -> npt.NDArray[np.bool_]:
    """The mistake that a cap invites."""
    drawn = batches(chance, sample_rate=sample_rate)
    return drawn & (drawn.cumsum(axis=1) <= max_batch)


def spread(counts: npt.NDArray[np.int64], expected: float, variance: float) -> float:
    """Sum of squares of standardised counts, less its mean, in its own standard deviations; near 0 if they are right.

    A squared standard normal has mean 1 and variance 2, so the sum over n of them has n and 2n.
    """
    sum_of_squares = float(((counts - expected) ** 2).sum()) / variance
    return (sum_of_squares - counts.size) / math.sqrt(2 * counts.size)


def test_users_are_drawn_at_the_promised_rate():
    # 400,000 coins at 0.1: the mean has a standard deviation of sqrt(0.1 x 0.9 / 400,000) = 0.00047; four are 1.9 %.
    tolerance = 4 * math.sqrt(0.1 * 0.9 / (NUM_STEPS * NUM_USERS))
    assert batches(Chance.seeded(1, "rate")).mean() == pytest.approx(0.1, abs=tolerance)
    assert batches(Chance.seeded(1, "rate"), sample_rate=0.095).mean() != pytest.approx(0.1, abs=tolerance)


def test_every_user_and_every_step_has_the_same_rate():
    # Binomial counts: per user over the steps, and per step over the users. A fixed batch size has no variance at all.
    drawn = batches(Chance.seeded(2, "margins"))
    assert abs(spread(drawn.sum(axis=0), 0.1 * NUM_STEPS, 0.09 * NUM_STEPS)) < 4
    assert abs(spread(drawn.sum(axis=1), 0.1 * NUM_USERS, 0.09 * NUM_USERS)) < 4
    shuffled = np.full(NUM_STEPS, NUM_USERS // 10)
    assert abs(spread(shuffled, 0.1 * NUM_USERS, 0.09 * NUM_USERS)) > 4


@pytest.mark.parametrize(("axis", "shift"), [(0, 1), (0, 7), (1, 1), (1, 7)], ids=["step", "steps", "user", "users"])
def test_draws_are_independent_between_steps_and_between_users(axis, shift):
    # Products of two independent centred coins have mean 0 and standard deviation 0.1 x 0.9; products of different
    # pairs are uncorrelated, even where the pairs share a coin. Four deviations.
    def together(drawn):
        centred = drawn - 0.1
        return (centred * np.roll(centred, shift, axis=axis)).mean()

    tolerance = 4 * 0.09 / math.sqrt(NUM_STEPS * NUM_USERS)
    drawn = batches(Chance.seeded(3, "pairs"))
    assert abs(together(drawn)) < tolerance
    drawn_again = drawn | (np.roll(drawn, shift, axis=axis) & (np.random.default_rng(0).random(drawn.shape) < 0.05))
    assert abs(together(drawn_again)) > tolerance  # one in twenty neighbours drags the other along


@pytest.mark.parametrize("max_batch", [1, 7, 20, 25, 200])
def test_no_batch_exceeds_its_cap_and_no_smaller_one_is_touched(max_batch):
    capped, free = (batches(Chance.seeded(4, "cap"), max_batch=cap) for cap in (max_batch, None))
    assert (capped.sum(axis=1) == np.minimum(free.sum(axis=1), max_batch)).all()
    assert (capped <= free).all()


def test_over_the_cap_every_subset_is_as_likely():
    # Half of 200 users are drawn and 20 stay: each with chance 0.1, whoever it is. Counts are binomial over the steps.
    def unevenness(drawn):
        assert (drawn.sum(axis=1) == 20).all()
        # With 20 of 200 fixed, counts of users are a little negatively correlated: less spread, by one part in 200.
        return spread(drawn.sum(axis=0), 0.1 * NUM_STEPS, 0.09 * NUM_STEPS)

    plan = {"sample_rate": 0.5, "max_batch": 20}
    assert abs(unevenness(batches(Chance.seeded(5, "subset"), **plan))) < 4
    assert unevenness(first_of_those_drawn(Chance.seeded(5, "subset"), **plan)) > 100


def test_over_the_cap_pairs_are_as_likely_too():
    # Neighbours in the data stay together with chance 20 x 19 / (200 x 199), as any two do. Steps are independent.
    drawn = batches(Chance.seeded(6, "pairs"), sample_rate=0.5, max_batch=20)
    both_per_step = (drawn & np.roll(drawn, 1, axis=1)).sum(axis=1)
    expected = 20 * 19 / 199
    assert both_per_step.mean() == pytest.approx(expected, abs=4 * both_per_step.std() / math.sqrt(NUM_STEPS))


def test_rate_one_takes_everyone():
    everyone = draw_users(50, sample_rate=1.0, max_batch=None, max_users=50, chance=Chance.seeded(7))
    assert everyone.tolist() == list(range(50))


@pytest.mark.parametrize("chance", [Chance.seeded(8), Chance.secret()], ids=["seeded", "secret"])
@pytest.mark.parametrize("max_batch", [None, 5])
def test_an_owner_without_users_draws_none(chance, max_batch):
    none = draw_users(0, sample_rate=0.5, max_batch=max_batch, max_users=10, chance=chance)
    assert none.shape == (0,)
    assert none.dtype == np.int64


def test_positions_ascend_and_the_same_seed_draws_the_same():
    plan = {"sample_rate": 0.5, "max_batch": 30, "max_users": 100}
    drawn = draw_users(100, **plan, chance=Chance.seeded(9, "owner-1"))
    assert (np.diff(drawn) > 0).all()
    assert drawn.dtype == np.int64
    assert (drawn == draw_users(100, **plan, chance=Chance.seeded(9, "owner-1"))).all()
    assert drawn.tolist() != draw_users(100, **plan, chance=Chance.seeded(9, "owner-2")).tolist()


def test_more_users_than_declared_are_refused_without_saying_how_many():
    with pytest.raises(InputError, match=r"Declare a larger privacy\.max_users") as refusal:
        draw_users(137, sample_rate=0.5, max_batch=None, max_users=100, chance=Chance.seeded(10))
    assert "137" not in str(refusal.value)
