"""Filters leave out exactly those whom the obvious loops would leave out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation.filters import coherent, lifts, novel, unlike
from shared.augmentation.tracing import private, public
from shared.data.histories import Histories
from shared.errors import InputError

NUM_ITEMS = 8

histories = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=6), min_size=1, max_size=12).map(
    lambda rows: Histories.from_rows(rows, NUM_ITEMS)
)
bounds = st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.75, 0.99])


def jaccard(one, other) -> float:
    one, other = set(one.tolist()), set(other.tolist())
    return len(one & other) / len(one | other) if one | other else 0.0


def rows(users: Histories) -> list[list[int]]:
    return [users.row(user).tolist() for user in range(users.num_users)]


@settings(max_examples=150, deadline=None)
@given(users=histories, bound=bounds)
def test_users_like_an_earlier_one_are_left_out(users, bound):
    kept = novel(public(users), max_similarity=bound).value
    expected = [
        row.tolist()
        for number, row in enumerate(map(users.row, range(users.num_users)))
        if all(jaccard(row, users.row(earlier)) <= bound + 1e-6 for earlier in range(number))
    ]
    assert rows(kept) == expected
    assert all(
        jaccard(kept.row(one), kept.row(other)) <= bound + 1e-6 for one in range(kept.num_users) for other in range(one)
    )


@settings(max_examples=150, deadline=None)
@given(users=histories, others=histories, bound=bounds)
def test_users_like_one_of_the_others_are_left_out(users, others, bound):
    kept = unlike(public(users), private(others), max_similarity=bound)
    expected = [
        row.tolist()
        for row in map(users.row, range(users.num_users))
        if all(jaccard(row, others.row(other)) <= bound + 1e-6 for other in range(others.num_users))
    ]
    assert rows(kept.value) == expected
    assert not kept.exportable  # also where nobody was left out


def test_more_users_than_one_block_are_compared():
    users = Histories.from_rows([[number] for number in range(600)] * 2, 600)
    assert rows(novel(public(users), max_similarity=0.5).value) == [[number] for number in range(600)]
    others = Histories.from_rows([[number] for number in range(0, 600, 2)], 600)
    assert unlike(public(users), public(others), max_similarity=0.5).value.num_users == 600


def test_nobody_to_compare_with_leaves_everybody():
    users, nobody = Histories.from_rows([[1], [2]], NUM_ITEMS), Histories.from_rows([], NUM_ITEMS)
    assert rows(unlike(public(users), private(nobody), max_similarity=0.0).value) == [[1], [2]]
    assert novel(public(nobody), max_similarity=0.0).value.num_users == 0
    assert coherent(public(nobody), min_lift=1.0).value.num_users == 0


def obvious_lift(users: Histories, user: int) -> float:
    others = [set(users.row(other).tolist()) for other in range(users.num_users) if other != user]
    uses = {item: sum(item in one for one in others) for item in set(users.row(user).tolist())}
    items = [item for item in uses if uses[item]]
    pairs = [(one, other) for one in items for other in items if one != other]
    if len(items) < 2:
        return float("nan")
    cosine = sum(
        sum({one, other} <= them for them in others) / np.sqrt(uses[one] * uses[other]) for one, other in pairs
    )
    return float(cosine / sum(np.sqrt(uses[one] * uses[other]) / len(others) for one, other in pairs))


@settings(max_examples=150, deadline=None)
@given(users=histories)
def test_lifts_are_what_the_obvious_loops_find(users):
    found = lifts(users)
    for user in range(users.num_users):
        assert found[user] == pytest.approx(obvious_lift(users, user), rel=1e-4, abs=1e-5, nan_ok=True)


def test_chance_has_lift_one_and_tastes_have_more():
    rng = np.random.default_rng(0)
    num_items, half = 40, 20
    chance = [np.flatnonzero(rng.random(num_items) < 0.3) for _ in range(2000)]
    of_chance = lifts(Histories.from_rows(chance, num_items))
    # A user's lift averages its ~66 pairs, each a count of ~180 shared users known to 1/√180 = 7.5 %; the mean over
    # users shares those errors of 780 pairs: 7.5 % / √780 = 0.3 %, four of which are 1.2 %.
    assert np.nanmean(of_chance) == pytest.approx(1.0, abs=0.012)
    tastes = [rng.choice(half, 6, replace=False) + half * (user % 2) for user in range(400)]
    mixed = [rng.choice(num_items, 6, replace=False) for _ in range(100)]
    users = Histories.from_rows([*tastes, *mixed], num_items)
    kept = coherent(public(users), min_lift=1.3).value
    is_pure = [len({item < half for item in row}) == 1 for row in rows(kept)]
    assert kept.num_users >= 400
    assert np.mean(is_pure) > 0.95


@pytest.mark.parametrize("bound", [-0.1, 1.0, float("nan")])
def test_bounds_that_make_no_sense_are_refused(bound):
    users = public(Histories.from_rows([[1]], NUM_ITEMS))
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        novel(users, max_similarity=bound)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        unlike(users, users, max_similarity=bound)


def test_a_negative_lift_is_refused():
    with pytest.raises(InputError, match="1 is chance"):
        coherent(public(Histories.from_rows([[1]], NUM_ITEMS)), min_lift=-1.0)


def test_another_catalogue_is_refused():
    one, other = Histories.from_rows([[1]], NUM_ITEMS), Histories.from_rows([[1]], NUM_ITEMS + 1)
    with pytest.raises(InputError, match="8 items cannot be compared with users over 9"):
        unlike(public(one), public(other), max_similarity=0.5)
