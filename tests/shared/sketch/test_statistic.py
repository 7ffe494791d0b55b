"""What an owner releases: how far one user can move it, how much noise it gets, which sums it is."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.base import Weights
from shared.privacy.releases import GaussianRelease
from shared.sketch import statistic
from shared.sketch.statistic import compute_sketch, plan_sketches, relative_noise, sensitivity, sketch_shapes
from shared.sketch.terms import SketchTerms

NUM_ITEMS = 12
EDGES = (1, 2, 4, 7)

user = st.lists(st.integers(0, NUM_ITEMS - 1), max_size=30)
heads = st.sets(st.integers(0, NUM_ITEMS - 1), min_size=1).map(sorted)


def terms(name: str, head_items: int = NUM_ITEMS, noise: float | None = None) -> SketchTerms:
    release = None if noise is None else GaussianRelease(statistic=name, noise_multiplier=noise, max_users=100)
    return SketchTerms(statistic=name, head_items=head_items, length_edges=EDGES, release=release)


def released(rows: list[list[int]], asked: SketchTerms, head: list[int] | None = None, seed: int = 0) -> Weights:
    chosen = None if head is None else np.array(head, dtype=np.int64)
    return compute_sketch(Histories.from_rows(rows, NUM_ITEMS), asked, head=chosen, chance=Chance.seeded(seed))


def as_one(arrays: Weights) -> np.ndarray:
    return np.concatenate([values.astype(np.float64) for values in arrays.values()])


def moved(others: list[list[int]], one: list[int], asked: SketchTerms, head: list[int] | None) -> float:
    with_user, without = as_one(released([*others, one], asked, head)), as_one(released(others, asked, head))
    return float(np.linalg.norm(with_user - without))


@pytest.mark.parametrize("name", ["popularity", "cooccurrence", "both"])
@given(others=st.lists(user, max_size=4), one=user, head=heads)
def test_one_user_moves_a_release_by_at_most_its_sensitivity(name, others, one, head):
    chosen = head if name == "cooccurrence" else None
    asked = terms(name, len(head) if chosen else NUM_ITEMS)
    # Arrays are rounded to single precision: a relative 6e-8 of sums of a few units, in under a hundred places.
    assert moved(others, one, asked, chosen) <= sensitivity(asked) + 1e-5


@pytest.mark.parametrize("name", ["popularity", "cooccurrence", "both"])
@pytest.mark.parametrize("length", [1, 3, NUM_ITEMS])
def test_a_user_of_any_length_reaches_the_sensitivity(name, length):
    # The bound is tight, so noise is not wasted, and a mechanism that adds more is seen by the test below.
    asked = terms(name)
    assert moved([[0, 5], [2]], list(range(length)), asked, None) == pytest.approx(sensitivity(asked), rel=1e-5)


def _square_of(row: np.ndarray) -> np.ndarray:
    whole = np.outer(row, row) * np.sqrt(2.0)
    whole[np.diag_indices(len(row))] /= np.sqrt(2.0)
    return whole[np.triu_indices(len(row))]


def _every_row(histories: Histories, *, once: bool) -> list[np.ndarray]:
    counts = [np.bincount(histories.row(u), minlength=NUM_ITEMS).astype(float) for u in range(histories.num_users)]
    return [np.minimum(row, 1.0) if once else row for row in counts]


def _without_the_length(histories: Histories) -> np.ndarray:
    return np.sum([_square_of(row) for row in _every_row(histories, once=True)], axis=0)


def _duplicates_counted(histories: Histories) -> np.ndarray:
    rows = _every_row(histories, once=False)
    return np.sum([_square_of(row) / max(1, np.count_nonzero(row)) for row in rows], axis=0)


def _lengths_beside_the_charge(histories: Histories) -> np.ndarray:
    asked = terms("both")
    arrays = compute_sketch(histories, asked, head=None, chance=Chance.seeded(0))
    # Two in place of the tenth that the sensitivity counts.
    arrays["lengths"] = np.float32(2.0 / statistic.SCALES["both"]["lengths"]) * arrays["lengths"]
    return as_one(arrays)


@pytest.mark.parametrize(
    ("broken", "name", "one"),
    [
        (_without_the_length, "cooccurrence", list(range(8))),
        (_duplicates_counted, "cooccurrence", [3, 3, 3, 4]),
        (_lengths_beside_the_charge, "both", [3]),
    ],
)
def test_broken_statistics_break_the_bound(broken: Callable[[Histories], np.ndarray], name: str, one: list[int]):
    others: list[list[int]] = [[0, 1], [2]]
    change = broken(Histories.from_rows([*others, one], NUM_ITEMS)) - broken(Histories.from_rows(others, NUM_ITEMS))
    assert float(np.linalg.norm(change)) > 1.1 * sensitivity(terms(name))


@given(rows=st.lists(user, min_size=1, max_size=5), head=heads)
def test_the_sums_are_those_of_a_slow_loop(rows, head):
    square, popularity, lengths = np.zeros((len(head), len(head))), np.zeros(NUM_ITEMS), np.zeros(len(EDGES))
    for items in map(set, rows):
        known = [head.index(item) for item in items if item in head]
        for first in known:
            for second in known:
                square[first, second] += 1.0 / len(known)
        for item in items:
            popularity[item] += 1.0 / math.sqrt(len(items))
        if items:
            lengths[max(place for place, edge in enumerate(EDGES) if edge <= len(items))] += 1.0
    expected = [
        square[i, j] * (1.0 if i == j else math.sqrt(2.0)) for i in range(len(head)) for j in range(i, len(head))
    ]
    got = released(rows, terms("cooccurrence", len(head)), head)["cooccurrence"]
    assert got == pytest.approx(expected, abs=1e-5)
    both = released(rows, terms("popularity"))
    scales = statistic.SCALES["popularity"]
    assert both["popularity"] == pytest.approx(scales["popularity"] * popularity, abs=1e-5)
    assert both["lengths"] == pytest.approx(scales["lengths"] * lengths, abs=1e-5)


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    rows = [list(range(start, NUM_ITEMS, step)) for start in range(3) for step in (1, 2, 5)]
    whole = released(rows, terms("both"))
    monkeypatch.setattr(statistic, "_ROWS_AT_ONCE", 5)
    assert released(rows, terms("both"))["cooccurrence"] == pytest.approx(whole["cooccurrence"], abs=1e-6)


NUM_DRAWS, MULTIPLIER = 1_500, 3.0


def noise_of(name: str) -> Weights:
    """Many draws of a release's noise, each array of shape ``(NUM_DRAWS, size)``."""
    asked, histories = terms(name, noise=MULTIPLIER), Histories.from_rows([[0, 1, 2]], NUM_ITEMS)
    exact = compute_sketch(histories, replace(asked, release=None), head=None, chance=Chance.seeded(0))
    chance = Chance.seeded(3)
    draws = [compute_sketch(histories, asked, head=None, chance=chance) for _ in range(NUM_DRAWS)]
    return {array: np.stack([draw[array] for draw in draws]) - values for array, values in exact.items()}


def has_the_promised_spread(name: str) -> bool:
    promised = MULTIPLIER * float(np.linalg.norm(list(statistic.SCALES[name].values())))
    # The spread of k normals is known to a relative 1 / √(2k); four of those, of each array.
    return all(
        abs(float(np.sqrt((noise.astype(np.float64) ** 2).mean())) / promised - 1.0) < 4.0 / math.sqrt(2.0 * noise.size)
        for noise in noise_of(name).values()
    )


@pytest.mark.parametrize("name", ["popularity", "cooccurrence", "both"])
def test_noise_has_the_spread_that_the_release_prices_in_every_array(name):
    assert has_the_promised_spread(name)


@pytest.mark.parametrize("name", ["popularity", "both"])
def test_noise_for_the_largest_scale_alone_would_be_seen(name, monkeypatch):
    monkeypatch.setattr(statistic, "sensitivity", lambda asked: max(statistic.SCALES[asked.statistic].values()))
    assert not has_the_promised_spread(name)  # 4 to 5 % too little


def test_no_two_numbers_share_noise():
    noise = np.concatenate(list(noise_of("both").values()), axis=1)
    correlations = np.corrcoef(noise.T)[np.triu_indices(noise.shape[1], 1)]
    # A correlation is known to 1 / √draws; of the 4,371 pairs here none exceeds five of those but one time in 400.
    assert np.abs(correlations).max() < 5.0 / math.sqrt(NUM_DRAWS)


def test_two_releases_of_one_stream_do_not_share_noise():
    asked, chance = terms("both", noise=1.0), Chance.seeded(1)
    histories = Histories.from_rows([[0]], NUM_ITEMS)
    first, second = (as_one(compute_sketch(histories, asked, head=None, chance=chance)) for _ in range(2))
    assert not np.isclose(first, second).any()


def test_users_without_items_add_nothing():
    for name in ("popularity", "cooccurrence", "both"):
        assert not as_one(released([[], []], terms(name))).any()


def test_plans_release_once_where_the_head_is_everything():
    (whole,) = plan_sketches(50, head_items=50)
    assert (whole.statistic, whole.head_items, relative_noise(whole)) == ("both", 50, 1.0)
    first, second = plan_sketches(50, head_items=20)
    assert (first.statistic, second.statistic, second.head_items) == ("popularity", "cooccurrence", 20)
    # Three times the noise multiplier costs a ninth.
    assert relative_noise(first) == 3.0 * relative_noise(second)
    assert sketch_shapes(second, 50) == {"cooccurrence": (210,)}


def test_the_arrays_are_those_that_were_announced():
    for name in ("popularity", "cooccurrence", "both"):
        arrays = released([[1, 2]], terms(name, noise=1.0))
        assert {key: value.shape for key, value in arrays.items()} == sketch_shapes(terms(name), NUM_ITEMS)
        assert list(arrays) == list(sketch_shapes(terms(name), NUM_ITEMS))
        assert {value.dtype for value in arrays.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("head", [[1, 1, 2], [2, 1, 0], [0, 1], [0, 1, NUM_ITEMS], [-1, 0, 1]])
def test_a_head_that_would_break_the_bound_is_refused(head):
    with pytest.raises(InputError, match="3 different items"):
        released([[1, 2]], terms("cooccurrence", 3), head)


def test_a_head_that_nobody_named_is_refused():
    with pytest.raises(InputError, match="name the head"):
        released([[1, 2]], terms("cooccurrence", 3))
    with pytest.raises(InputError, match="as a whole"):
        sketch_shapes(terms("both", 3), NUM_ITEMS)
