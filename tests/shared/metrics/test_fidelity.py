"""Distances have the values worked out by hand, their ceilings those of real users, and the chain is a distribution."""

from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.histories import Histories
from shared.errors import InputError
from shared.metrics.fidelity import _Counted, fidelity, markov_log_likelihood

EDGES = (1, 60, 3600)


def world(num_users: int, *, seed: int, returns: float = 0.2, pace: float = 0.5, length: int = 12) -> Histories:
    """Users of one made-up population; the arguments tell populations apart."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, 41)
    shares = popularity / popularity.sum()
    rows = [rng.choice(40, rng.integers(2, length), replace=False, p=shares) for _ in range(num_users)]
    return Histories.from_rows(
        rows,
        40,
        timestamps=[np.cumsum(rng.choice([0, 100], len(row), p=[1 - pace, pace])) for row in rows],
        behaviours=[rng.random(len(row)) < returns for row in rows],
    )


def measured(real: Histories, synthetic: Histories) -> dict:
    return fidelity(real, synthetic, gap_edges=EDGES, rng=np.random.default_rng(0))


def test_users_of_the_same_population_reach_the_ceiling():
    found = measured(world(800, seed=1), world(800, seed=2))
    assert set(found) == {"popularity", "bigrams", "lengths", "gaps", "behaviours", "transitions"}
    for name, closeness in found.items():
        assert 0 < closeness.ceiling < 0.5, name
        # A distance's own chance is of its size where there are but two kinds; ceilings are means over ten halvings.
        assert closeness.distance < 2.5 * closeness.ceiling, name


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"returns": 0.4}, {"behaviours", "transitions"}),
        ({"pace": 0.8}, {"gaps"}),
        ({"length": 20}, {"lengths"}),
    ],
)
def test_what_differs_is_seen_and_nothing_else(changes, names):
    found = measured(world(800, seed=1), world(800, seed=2, **changes))
    far = {name for name, closeness in found.items() if closeness.distance > 2.5 * closeness.ceiling}
    assert far - {"popularity"} == names  # longer users without repeats reach rarer items


def test_distances_are_those_worked_out_by_hand():
    real = Histories.from_rows([[0, 1]] * 4, 4, timestamps=[[0, 0]] * 4, behaviours=[[0, 0]] * 4)
    drawn = Histories.from_rows([[0, 2, 3]] * 2, 4, timestamps=[[0, 0, 99]] * 2, behaviours=[[0, 1, 1]] * 2)
    found = measured(real, drawn)
    assert all(closeness.ceiling == 0 for closeness in found.values())
    # Real (1/2, 1/2, 0, 0) against (1/3, 0, 1/3, 1/3): the middle is (5/12, 1/4, 1/6, 1/6).
    divergence = (log(6 / 5) / 2 + log(2) / 2 + log(4 / 5) / 3 + 2 * log(2) / 3) / 2 / log(2)
    assert found["popularity"].distance == pytest.approx(sqrt(divergence))
    assert found["bigrams"].distance == pytest.approx(1.0)  # no pair in common
    assert found["lengths"].distance == pytest.approx(1.0)
    assert found["gaps"].distance == pytest.approx(0.5)  # every gap none, against every second
    assert found["behaviours"].distance == pytest.approx(2 / 3)
    assert found["transitions"].distance == pytest.approx(1.0)


def test_what_one_side_lacks_is_left_out():
    real = world(20, seed=1)
    plain = Histories(real.indptr, real.items, real.num_items)
    assert set(measured(real, plain)) == {"popularity", "bigrams", "lengths"}
    assert "gaps" not in fidelity(real, real, rng=np.random.default_rng(0))


def test_too_few_users_are_refused():
    one = Histories.from_rows([[1]], 3)
    with pytest.raises(InputError, match=r"Give two real users and a synthetic one at least, in one catalogue"):
        fidelity(one, one, rng=np.random.default_rng(0))


def test_a_distance_shrinks_with_the_number_of_users_and_its_ceiling_with_it():
    few, many = (measured(world(count, seed=1), world(count, seed=2))["popularity"] for count in (100, 1600))
    # Jensen-Shannon distance of two samples falls as the root of their size: fourfold from 16 times the users.
    assert few.ceiling / many.ceiling == pytest.approx(4.0, rel=0.3)
    assert few.distance / many.distance == pytest.approx(4.0, rel=0.3)


rows = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(train=rows, test=rows, occurrences=st.integers(1, 2), strength=st.floats(0.1, 100), prior=st.floats(0.01, 2))
def test_the_chain_is_the_slow_one(train, test, occurrences, strength, prior):
    known, asked = (Histories.from_rows(part, 5) for part in (train, test))
    popularity = (np.bincount(known.items, minlength=5) + prior) / (len(known.items) + 5 * prior)
    expected = []
    for row in test:
        for place, item in enumerate(row):
            after = [r[k] for r in train for k in range(len(r)) if r[:k][-1:] == row[:place][-1:]]
            weights = np.bincount(np.array(after, dtype=int), minlength=5) + strength * popularity
            weights[[i for i in range(5) if i != item and row[:place].count(i) >= occurrences]] = 0.0
            expected.append(np.log(weights[item] / weights.sum()))
    found = _Counted.of(known, asked, occurrences).log_likelihood(strength, prior)
    assert np.allclose(found, expected, atol=1e-9)


def test_the_chain_learns_order_where_there_is_one():
    rng = np.random.default_rng(0)
    walks = Histories.from_rows([(np.arange(6) + start) % 30 for start in rng.integers(0, 30, 400)], 30)
    train, test = walks.select(np.arange(300)), walks.select(np.arange(300, 400))
    found = markov_log_likelihood(train, test).reshape(100, 6)
    assert found[:, 1:].mean() > -0.2  # what follows is certain; at random it would be log(1/30) = -3.4
    shuffled = Histories.from_rows([rng.permutation(30)[:6] for _ in range(400)], 30)
    without = markov_log_likelihood(shuffled.select(np.arange(300)), shuffled.select(np.arange(300, 400)))
    # Nothing to learn: what is left is a choice among the items that have not happened, 30 down to 25 of them.
    best = -np.log(np.arange(30, 24, -1)).mean()
    assert best - 0.05 < without.mean() < best + 0.01
