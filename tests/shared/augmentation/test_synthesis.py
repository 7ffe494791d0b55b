"""Users drawn from the prior: inside the catalogue, repeatable, distributed as asked."""

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.augmentation import synthesis
from shared.augmentation.synthesis import Condition, synthesise_blocks, synthesise_users
from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.bags import LatentModel
from shared.generators.base import GeneratorModel
from shared.generators.lengths import LengthShares
from tests.shared.generators.test_bags import excess
from tests.shared.generators.test_multvae import SPEC, model

ZIPF = -torch.log(torch.arange(1.0, SPEC.num_items + 1))
TAIL = np.arange(SPEC.num_items // 3, SPEC.num_items)


def users(one=None, *, num_users=40, mean=5, bound=20, seed=0, **changes):
    one = model() if one is None else one
    return synthesise_users(
        one, num_users=num_users, items_per_user=mean, max_items_per_user=bound, seed=seed, **changes
    )


def with_popularity():
    """Item ``i`` is about ``1 / (i + 1)`` as likely as item 0, and latents change that."""
    one = model()
    with torch.no_grad():
        one.to_logits.bias.copy_(ZIPF / SPEC.popularity_scale)
    return one


def with_tastes():
    """Users differ in what they like far more than by chance."""
    one = with_popularity()
    with torch.no_grad():
        one.to_logits.weight.mul_(5)
    return one


class WithoutLatents(GeneratorModel):
    """All users have one taste, by default none."""

    def __init__(self, logits=None):
        super().__init__()
        self.spec = SPEC
        self.logits = torch.zeros(SPEC.num_items) if logits is None else logits

    def encode(self, histories):
        raise NotImplementedError

    def loss(self, users, *, share_done, chance):
        raise NotImplementedError

    def draw(self, lengths, *, generator, tilt=None):
        shares = torch.softmax(self.logits if tilt is None else self.logits + torch.from_numpy(tilt), dim=0)
        rows = [torch.multinomial(shares, int(length), generator=generator).numpy() for length in lengths]
        return Histories.from_rows(rows, SPEC.num_items)


@given(users_=st.integers(1, 60), mean=st.integers(1, 20), bound=st.integers(20, 60), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_histories_keep_every_bound(users_, mean, bound, seed):
    drawn = users(num_users=users_, mean=mean, bound=bound, seed=seed)
    assert drawn.num_users == users_
    lengths = drawn.lengths()
    assert lengths.min() >= 1
    assert lengths.max() <= min(bound, SPEC.num_items)
    assert all(len(set(drawn.row(user).tolist())) == lengths[user] for user in range(users_))


@pytest.mark.parametrize(
    "changes",
    [{}, {"lengths": LengthShares((1, 4), (0.5, 0.5))}, {"condition": Condition(tail=1.0, segment=(3, 4))}],
)
def test_the_same_seed_draws_the_same_users(changes):
    one, again, other = (users(seed=seed, **changes) for seed in (1, 1, 2))
    assert np.array_equal(one.items, again.items)
    assert np.array_equal(one.indptr, again.indptr)
    assert not np.array_equal(one.items[:50], other.items[:50])


def test_items_are_drawn_in_proportion_to_the_decoder():
    one = model()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
        one.to_logits.bias[0] = float(np.log(9.0)) / SPEC.popularity_scale
    drawn = users(one, num_users=4000, mean=1)
    expected = 9.0 / (9.0 + SPEC.num_items - 1)
    # One item each, so a share of n draws: four standard errors.
    tolerance = 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert np.mean(drawn.items == 0) == pytest.approx(expected, abs=tolerance)


def test_blocks_are_the_users_in_order(monkeypatch):
    monkeypatch.setattr(synthesis, "USERS_PER_BLOCK", 16)
    blocks = list(synthesise_blocks(model(), num_users=40, items_per_user=5, max_items_per_user=20, seed=3))
    assert [block.num_users for block in blocks] == [16, 16, 8]
    whole = users(seed=3)
    assert np.array_equal(np.concatenate([block.items for block in blocks]), whole.items)
    # Other users than those of the first block, and the same ones where more are asked for.
    assert blocks[0].row(0).tolist() != blocks[1].row(0).tolist()
    assert np.array_equal(users(num_users=100, seed=3).select(range(32)).items, whole.select(range(32)).items)


def test_blocks_share_no_chance(monkeypatch):
    monkeypatch.setattr(synthesis, "USERS_PER_BLOCK", 16)
    lengths = users(WithoutLatents()).lengths()
    assert not np.array_equal(lengths[:16], lengths[16:32])
    items = users(WithoutLatents(), mean=1, bound=1).items  # equal lengths, so that only the items can differ
    assert not np.array_equal(items[:16], items[16:32])


def test_what_a_block_draws_does_not_move_the_next(monkeypatch):
    monkeypatch.setattr(synthesis, "USERS_PER_BLOCK", 16)

    class Greedy(WithoutLatents):
        def draw(self, lengths, *, generator, tilt=None):
            found = super().draw(lengths, generator=generator, tilt=tilt)
            torch.rand(7, generator=generator)
            return found

    assert np.array_equal(users(Greedy()).items, users(WithoutLatents()).items)


def test_impossible_numbers_are_refused_before_anything_is_drawn():
    with pytest.raises(InputError, match="between 1 and the bound"):
        synthesise_blocks(model(), num_users=5, items_per_user=30, max_items_per_user=20, seed=0)
    with pytest.raises(InputError, match="at least one user"):
        synthesise_blocks(model(), num_users=0, items_per_user=5, max_items_per_user=20, seed=0)
    with pytest.raises(InputError, match="catalogue of 30 items"):
        users(condition=Condition(segment=(3, 30)))


RELEASED = LengthShares((1, 3, 8), (0.5, 0.3, 0.2))


def test_released_lengths_are_uniform_within_buckets():
    lengths = RELEASED.draw(100_000, 10**9, np.random.default_rng(0))
    counts = np.append(np.bincount(lengths[lengths < 8], minlength=8)[1:], (lengths >= 8).sum())
    assert excess(counts, [0.25, 0.25, *[0.06] * 5, 0.2]) < 1
    assert excess(counts, [0.26, 0.24, *[0.06] * 5, 0.2]) > 1


def test_the_last_bucket_goes_on_geometrically():
    lengths = RELEASED.draw(100_000, 10**9, np.random.default_rng(0))
    beyond = lengths[lengths >= 8] - 8
    # A geometric number from 0 of mean 8 has variance 8 * 9; four standard errors of a mean.
    assert beyond.mean() == pytest.approx(8, abs=4 * sqrt(72 / len(beyond)))
    assert np.mean(beyond == 0) == pytest.approx(1 / 9, abs=4 * sqrt(8 / 81 / len(beyond)))


def test_released_lengths_are_cut_at_the_bound():
    drawn = users(num_users=2000, mean=1, bound=9, lengths=RELEASED).lengths()
    assert drawn.max() == 9
    assert np.mean(drawn >= 8) == pytest.approx(0.2, abs=4 * sqrt(0.2 * 0.8 / 2000))


@pytest.mark.parametrize(
    ("edges", "shares", "advice"),
    [
        ((1, 3), (0.5, 0.6), "divide by the sum"),
        ((1, 3), (1.1, -0.1), "cut at 0"),
        ((1, 3), (float("nan"), 1.0), "add up to 1"),
        ((3, 1), (0.5, 0.5), "rising"),
        ((0, 1), (0.5, 0.5), "from 1 on"),
        ((1,), (0.5, 0.5), "one share each"),
        ((), (), "one share each"),
    ],
)
def test_shares_that_are_no_distribution_are_refused(edges, shares, advice):
    with pytest.raises(InputError, match=advice):
        LengthShares(edges, shares)


@given(longest=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_cold_users_have_few_items(longest, seed):
    lengths = users(num_users=60, mean=20, seed=seed, condition=Condition(max_length=longest)).lengths()
    assert lengths.min() >= 1
    assert lengths.max() <= min(longest, 20)


def test_cold_lengths_are_equally_likely():
    lengths = users(num_users=8000, condition=Condition(max_length=4), lengths=RELEASED).lengths()
    assert excess(np.bincount(lengths, minlength=5)[1:], [0.25] * 4) < 1


def share_of(histories, items):
    return float(np.isin(histories.items, items).mean())


def test_the_tail_rises_with_its_strength():
    drawn = [
        users(with_popularity(), num_users=1500, condition=Condition(tail=strength))
        for strength in (0.0, 0.3, 0.6, 1.0, 1.5)
    ]
    shares = [share_of(histories, TAIL) for histories in drawn]
    # A user adds at most 20 interactions of 7,500: one more or less in every second user would be a third of a step.
    assert all(high - low > 0.03 for low, high in pairwise(shares))
    assert np.array_equal(drawn[0].items, users(with_popularity(), num_users=1500).items)


def test_a_tail_of_one_makes_items_about_equally_likely():
    one = WithoutLatents(ZIPF)
    flat, lifted = (users(one, num_users=3000, mean=1, condition=Condition(tail=tail)) for tail in (0.0, 1.0))
    spread = [
        np.bincount(drawn.items, minlength=SPEC.num_items).std() * SPEC.num_items / 3000 for drawn in (flat, lifted)
    ]
    # The chance of 4096 draws behind the popularity is 0.12 of an item's share on average, that of 3000 users 0.10:
    # together 0.16, and twice as much is allowed. Popularity itself spreads items by 1.3.
    assert spread[1] < 0.32
    assert spread[0] > 1.0


@pytest.mark.parametrize("make", [with_tastes, WithoutLatents])
def test_a_segment_is_favoured(make):
    segment = (11, 17, 23)
    assert isinstance(make(), LatentModel) is (make is with_tastes)
    plain = users(make(), num_users=4000)
    favoured = users(make(), num_users=4000, condition=Condition(segment=segment))
    without, with_it = share_of(plain, segment), share_of(favoured, segment)
    # Fewer than 20,000 interactions in clusters of five: four standard errors of a share stay below 0.015.
    assert with_it > without + 0.015
    assert np.array_equal(plain.lengths(), favoured.lengths())


@pytest.mark.parametrize("make", [with_tastes, lambda: WithoutLatents(ZIPF)])
def test_a_segment_and_the_tail_go_together(make):
    segment = (11, 17, 23)
    tail, favoured, both = (
        users(make(), num_users=4000, condition=condition)
        for condition in (Condition(tail=1.0), Condition(segment=segment), Condition(tail=1.0, segment=segment))
    )
    assert share_of(both, segment) > share_of(tail, segment) + 0.015
    assert share_of(both, TAIL) > share_of(favoured, TAIL) + 0.03


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"max_length": 0}, "at least one item"),
        ({"tail": -0.1}, "between 0 and 4"),
        ({"tail": float("nan")}, "between 0 and 4"),
        ({"segment": (2, 2)}, "must rise"),
        ({"segment": (-1, 2)}, "from 0 on"),
    ],
)
def test_conditions_out_of_range_are_refused(changes, advice):
    with pytest.raises(InputError, match=advice):
        Condition(**changes)
