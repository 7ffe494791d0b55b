"""Users drawn from logits: distributed as Plackett and Luce say, repeatable, and never stuck."""

from dataclasses import dataclass
from itertools import permutations
from math import comb, log, prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from shared.errors import InputError
from shared.generators import bags
from shared.generators.bags import LatentModel, SteeredLatents, draw_bags
from tests.shared.generators.test_multvae import SPEC, model


@dataclass(frozen=True)
class Size:
    num_items: int


class OneSoftmax:
    """Every user has the same logits."""

    def __init__(self, logits) -> None:
        self.logits = torch.as_tensor(np.asarray(logits), dtype=torch.float32)
        self.spec = Size(len(self.logits))

    def sample_latent(self, num_users, *, generator):
        return torch.zeros(num_users, 1)

    def decode(self, latent):
        return self.logits.repeat(len(latent), 1)


class Taste(OneSoftmax):
    """Latents are fair coins: heads have the logits as they are, tails have them reversed."""

    def sample_latent(self, num_users, *, generator):
        return torch.randint(0, 2, (num_users, 1), generator=generator).float()

    def decode(self, latent):
        return torch.where(latent > 0, self.logits, self.logits.flip(0))


def drawn(one, lengths, *, seed=0, tilt=None):
    lengths = np.asarray(lengths, dtype=np.int64)
    return draw_bags(one, lengths, generator=torch.Generator().manual_seed(seed), tilt=tilt)


def rows(histories, length):
    return histories.items.reshape(-1, length)


def excess(counts, shares):
    """Pearson's statistic over its 1 - 1e-6 quantile: above 1, the counts are not of these shares."""
    expected = np.asarray(shares) * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum() / chi2.ppf(1 - 1e-6, len(counts) - 1))


def softmax(logits):
    weights = np.exp(np.asarray(logits, dtype=float) - np.max(logits))
    return weights / weights.sum()


def plackett_luce(shares, order):
    left = 1 - np.concatenate([[0.0], np.cumsum([shares[item] for item in order])])
    return prod(shares[item] / rest for item, rest in zip(order, left, strict=False))


LOGITS = [0.0, 1.0, -0.5, 0.3, 1.6, -1.0]


def test_every_order_of_three_items_is_as_likely_as_plackett_and_luce_say():
    three = rows(drawn(OneSoftmax(LOGITS), np.full(60_000, 3)), 3)
    orders = list(permutations(range(6), 3))
    place = {order: number for number, order in enumerate(orders)}
    counts = np.bincount([place[tuple(row)] for row in three.tolist()], minlength=len(orders))
    assert excess(counts, [plackett_luce(softmax(LOGITS), order) for order in orders]) < 1
    moved = softmax([LOGITS[0] + 0.2, *LOGITS[1:]])  # a fifth more for one item is caught
    assert excess(counts, [plackett_luce(moved, order) for order in orders]) > 1


def test_inclusion_probabilities_are_the_enumerated_ones():
    num_users, shares = 60_000, softmax(LOGITS)
    three = rows(drawn(OneSoftmax(LOGITS), np.full(num_users, 3), seed=1), 3)
    for item in range(6):
        exact = sum(plackett_luce(shares, order) for order in permutations(range(6), 3) if item in order)
        # A share of n independent users: four standard errors.
        tolerance = 4 * sqrt(exact * (1 - exact) / num_users)
        assert np.mean((three == item).any(axis=1)) == pytest.approx(exact, abs=tolerance)
        assert 3 * shares[item] != pytest.approx(exact, abs=tolerance)  # drawing with replacement is caught


def test_first_items_follow_the_softmax_over_many_sums():
    logits = np.random.default_rng(0).normal(size=300)
    first = drawn(OneSoftmax(logits), np.ones(100_000, dtype=int)).items
    counts = np.bincount(first, minlength=300)
    assert excess(counts, softmax(logits)) < 1
    assert excess(counts, softmax(0.9 * logits)) > 1


def test_what_one_item_leaves_is_shared_rightly():
    # e^-40 is far below the rounding of the largest share, and still large enough to be drawn from shares.
    logits = np.full(100, 0.0)
    logits[7], logits[8] = 40.0, log(30.0)
    two = rows(drawn(OneSoftmax(logits), np.full(20_000, 2)), 2)
    assert (two[:, 0] == 7).all()
    second = np.bincount(two[:, 1], minlength=100)
    assert second[7] == 0
    assert excess(np.delete(second, 7), np.delete(softmax([*logits[:7], -1e9, *logits[8:]]), 7)) < 1


# e^-102.92 is one and a half of the smallest steps of a float32: as shares, 1 : 2.5 would become 1 : 4.
@pytest.mark.parametrize(("top", "low"), [(1e4, -1e4), (0.0, -102.92)])
def test_what_cannot_be_told_from_zero_is_shared_rightly(top, low):
    logits = np.full(20, low)
    logits[3], logits[4] = top, low + log(2.5)
    two = rows(drawn(OneSoftmax(logits), np.full(5_000, 2)), 2)
    assert (two[:, 0] == 3).all()
    second = np.bincount(two[:, 1], minlength=20)
    assert second[3] == 0
    assert excess(np.delete(second, 3), np.where(np.arange(19) == 3, 2.5, 1.0) / 20.5) < 1
    assert excess(np.delete(second, 3), np.where(np.arange(19) == 3, 4.0, 1.0) / 22) > 1


@given(
    num_items=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_items_are_distinct_however_unequal_their_shares(num_items, scale, seed, data):
    lengths = data.draw(st.lists(st.integers(0, num_items), min_size=1, max_size=8))
    logits = scale * np.random.default_rng(seed).uniform(-1, 1, num_items)
    histories = drawn(OneSoftmax(logits), lengths, seed=seed)
    assert histories.lengths().tolist() == lengths
    assert all(len(set(histories.row(user).tolist())) == length for user, length in enumerate(lengths))


def test_a_history_of_every_item_is_in_order_where_shares_are_worlds_apart():
    logits = np.linspace(1e4, -1e4, 50)  # steps of 408: the order is certain
    histories = drawn(OneSoftmax(logits), [50, 50])
    assert histories.items.tolist() == [*range(50), *range(50)]


def test_the_compiled_draw_is_the_obvious_one():
    rng = np.random.default_rng(3)
    shares = rng.gamma(0.2, size=(40, 333)).astype(np.float32)
    shares /= shares.sum(axis=1, keepdims=True)
    uniforms, pointers = rng.uniform(size=800), np.arange(0, 801, 20)
    slow = []
    for user, row in enumerate(shares.astype(float)):
        for place in range(pointers[user], pointers[user + 1]):
            sums = np.cumsum(row)
            slow.append(int(np.searchsorted(sums, uniforms[place] * sums[-1], side="right")))
            row[slow[-1]] = 0.0
    items, reached = np.empty(800, np.int32), np.empty(40, np.int64)
    bags._draw(shares.copy(), uniforms, pointers, items, reached)
    assert reached.tolist() == pointers[1:].tolist()
    assert items.tolist() == slow


def test_threads_and_parts_change_nothing(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, SPEC.num_items + 1, 101)
    one, before = model(), torch.get_num_threads()
    found = []
    try:
        for threads, at_once in ((1, 512), (3, 512), (2, 7), (4, 1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(bags, "_USERS_AT_ONCE", at_once)
            found.append(drawn(one, lengths).items)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert not np.array_equal(found[0], drawn(one, lengths, seed=1).items)


def test_a_tilt_is_added_to_the_logits():
    tilt = np.array([0.5, -1.0, 0.0, 2.0, 0.25, 0.0], dtype=np.float32)
    lengths = np.full(500, 3)
    tilted = drawn(OneSoftmax(LOGITS), lengths, tilt=tilt)
    assert np.array_equal(tilted.items, drawn(OneSoftmax(np.float32(LOGITS) + tilt), lengths).items)
    assert not np.array_equal(tilted.items, drawn(OneSoftmax(LOGITS), lengths).items)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(value):
    with pytest.raises(InputError, match="earlier checkpoint"):
        drawn(OneSoftmax([0.0, value, 0.0]), [3])


def heads_among(num_candidates, mass):
    """Chance that a candidate with heads stays, where heads have ``mass`` and tails the rest of 1."""
    heads = np.arange(num_candidates + 1)
    weight = heads * mass / (heads * mass + (num_candidates - heads) * (1 - mass))
    return sum(comb(num_candidates, k) / 2**num_candidates * weight[k] for k in heads)


def test_latents_are_chosen_by_their_mass_on_the_segment():
    one = Taste([log(9.0), 0.0])  # of heads 90 % lies on item 0, of tails 10 %
    assert isinstance(one, LatentModel)
    steered = SteeredLatents(one, np.array([0]), num_candidates=4)
    latent = steered.sample_latent(20_000, generator=torch.Generator().manual_seed(0))
    expected = heads_among(4, 0.9)
    tolerance = 4 * sqrt(expected * (1 - expected) / 20_000)  # four standard errors of a share
    assert float(latent.mean()) == pytest.approx(expected, abs=tolerance)
    assert heads_among(3, 0.9) != pytest.approx(expected, abs=tolerance)
    # In the limit: the chance of heads, given that the first item is item 0.
    assert heads_among(500, 0.9) == pytest.approx(0.9, abs=0.001)


def test_a_tilt_counts_when_latents_are_chosen():
    one = Taste([log(9.0), 0.0])
    tilt = np.array([-log(9.0), 0.0], dtype=np.float32)  # heads now have half their mass on item 0
    steered = SteeredLatents(one, np.array([0]), num_candidates=2, tilt=tilt)
    latent = steered.sample_latent(20_000, generator=torch.Generator().manual_seed(0))
    heads, tails = 0.5, 1 / (1 + 81)
    expected = 1 / 4 + 1 / 2 * heads / (heads + tails)
    assert float(latent.mean()) == pytest.approx(expected, abs=4 * sqrt(expected * (1 - expected) / 20_000))


def test_one_candidate_is_the_prior():
    one, segment = model(), np.array([1, 2])
    alone = SteeredLatents(one, segment, num_candidates=1).sample_latent(5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(alone, one.sample_latent(5, generator=torch.Generator().manual_seed(4)))
