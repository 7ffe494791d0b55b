"""No split lets a held-out interaction reach training, and the guards would notice one that did."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.data.histories import Histories
from shared.data.splits import Split, assert_no_leak, assert_users_disjoint, show_part, split_histories, time_cut
from shared.errors import InputError, LeakError
from shared.rng import stream

NUM_ITEMS = 12


def histories_of(rows, stamps=None) -> Histories:
    made = Histories.from_rows(rows, NUM_ITEMS)
    if stamps is None:
        return made
    return Histories(made.indptr, made.items, NUM_ITEMS, np.array(stamps, dtype=np.int64))


@st.composite
def histories(draw, timed=None):
    rows = draw(st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=8), min_size=2, max_size=10))
    if not (draw(st.booleans()) if timed is None else timed):
        return histories_of(rows)
    stamps = [sorted(draw(st.lists(st.integers(0, 20), min_size=len(r), max_size=len(r)))) for r in rows]
    return histories_of(rows, [t for row in stamps for t in row])


def split(made, holdout, *, share=0.3, fold_in=0.8, seed=0, **options) -> Split:
    return split_histories(
        made, holdout=holdout, holdout_share=share, fold_in_share=fold_in, rng=stream(seed, "t"), **options
    )


def rows(part: Histories) -> list[tuple[int, ...]]:
    return [tuple(part.row(user).tolist()) for user in range(part.num_users)]


@settings(max_examples=150, deadline=None)
@given(made=histories(), share=st.floats(0.05, 0.95), fold_in=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_held_out_users_are_whole_and_never_trained_on(made, share, fold_in, seed):
    assume((made.lengths() >= 2).any())
    result = split(made, "users", share=share, fold_in=fold_in, seed=seed)
    assert (result.fold_in.lengths() >= 1).all()
    assert (result.targets.lengths() >= 1).all()
    assert result.train.num_users + result.targets.num_users == made.num_users
    tested = [tuple(sorted(a + b)) for a, b in zip(rows(result.fold_in), rows(result.targets), strict=True)]
    everyone = sorted(tuple(sorted(row)) for row in rows(made))
    assert sorted([*tested, *(tuple(sorted(row)) for row in rows(result.train))]) == everyone


@settings(max_examples=100, deadline=None)
@given(made=histories())
def test_leaving_the_last_out_loses_nothing_else(made):
    assume((made.lengths() >= 2).any())
    result = split(made, "last")
    whole = [row for row in rows(made) if len(row) >= 2]
    assert [a + b for a, b in zip(rows(result.fold_in), rows(result.targets), strict=True)] == whole
    assert (result.targets.lengths() == 1).all()
    assert rows(result.train) == [row[:-1] if len(row) >= 2 else row for row in rows(made)]


@settings(max_examples=100, deadline=None)
@given(made=histories(timed=True), cut=st.integers(1, 20))
def test_nothing_from_the_cut_on_is_trained_on(made, cut):
    early, late = made.keep(made.timestamps < cut).lengths(), made.keep(made.timestamps >= cut).lengths()
    if not ((early > 0) & (late > 0)).any():
        with pytest.raises(InputError, match=r"both before and after the cut"):
            split(made, "time", cut=cut)
        return
    result = split(made, "time", cut=cut)
    assert (result.train.timestamps < cut).all()
    assert (result.fold_in.timestamps < cut).all()
    assert (result.targets.timestamps >= cut).all()
    assert result.train.num_interactions == early.sum()
    assert result.targets.num_users == ((early > 0) & (late > 0)).sum()


def test_the_default_cut_leaves_the_newest_share():
    made = histories_of([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [0, 1, 2, 3, 8, 4, 5, 6, 7, 9])
    assert time_cut(made, 0.2) == 8
    assert rows(split(made, "time", share=0.2).targets) == [(4,), (9,)]


def test_time_needs_timestamps_and_users_need_company():
    with pytest.raises(InputError, match=r"needs a timestamp for every interaction"):
        split(histories_of([[0, 1], [2, 3]]), "time")
    with pytest.raises(InputError, match=r"needs a timestamp for every interaction"):
        split(histories_of([[0, 1], [2, 3]]), "time", cut=5)
    with pytest.raises(InputError, match=r"holding out users needs 2 users"):
        split(histories_of([[0, 1]]), "users")
    with pytest.raises(InputError, match=r"2 or more items"):
        split(histories_of([[0], [1]]), "last")


def test_same_stream_same_split_and_another_differs():
    made = histories_of([[i, (i + 1) % 12, (i + 5) % 12] for i in range(12)])
    assert rows(split(made, "users").targets) == rows(split(made, "users").targets)
    assert rows(split(made, "users", seed=1).targets) != rows(split(made, "users").targets)


def test_guard_a_target_in_the_fold_in():
    part = histories_of([[1, 2]])
    with pytest.raises(LeakError, match=r"1 target.s. are in the fold-in"):
        Split(part, histories_of([[3, 4]]), histories_of([[4]]))
    Split(part, histories_of([[3], [4]]), histories_of([[4], [3]]))  # another user's fold-in is no leak


def test_guard_a_test_user_in_train():
    with pytest.raises(LeakError, match=r"1 test user"):
        assert_users_disjoint(np.array([0, 1, 2]), np.array([2, 3]))


def test_guard_a_target_in_the_training_row_of_its_user():
    leaking = Split(histories_of([[1, 2], [3]]), histories_of([[1]]), histories_of([[3]]))
    assert_no_leak(leaking, np.array([7, 8]), np.array([7]))
    with pytest.raises(LeakError, match=r"1 target"):
        assert_no_leak(leaking, np.array([7, 8]), np.array([8]))


@pytest.mark.parametrize(
    ("train", "fold_in", "targets", "name"), [(5, 1, 5, "train"), (1, 5, 5, "fold-in"), (1, 1, 4, "targets")]
)
def test_guard_the_wrong_side_of_the_cut(train, fold_in, targets, name):
    leaking = Split(histories_of([[1]], [train]), histories_of([[1]], [fold_in]), histories_of([[2]], [targets]))
    with pytest.raises(LeakError, match=f"{name}: 1 interaction"):
        assert_no_leak(leaking, np.array([0]), np.array([0]), cut=5)


def test_parts_are_the_oldest_and_newest_or_drawn_at_random():
    rows = Histories.from_rows([np.arange(10), np.arange(2)], 10)
    shown, hidden = show_part(rows, 0.8, rng=None)
    assert (shown.row(0).tolist(), hidden.row(0).tolist()) == (list(range(8)), [8, 9])
    assert (shown.row(1).tolist(), hidden.row(1).tolist()) == ([0], [1])
    draws = {tuple(show_part(rows, 0.8, rng=np.random.default_rng(seed))[1].row(0)) for seed in range(5)}
    assert len(draws) > 1
