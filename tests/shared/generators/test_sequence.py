"""The sequence generator: its probabilities, its draws, and what DP-SGD needs of it."""

import dataclasses
import itertools
import json
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES
from shared.errors import InputError
from shared.generators.base import initial_weights_of, load_weights
from shared.generators.sequence import SequenceModel, SequenceSpec, _drawn
from shared.generators.sequence_events import Events
from shared.generators.sequence_likelihood import Taken, next_item_log_likelihood
from shared.metrics.fidelity import fidelity, markov_log_likelihood
from tests.shared.dpsgd.models import numbers, refilled
from tests.shared.dpsgd.stepping import Case, by_hand, largest_gap, released

SPEC = SequenceSpec(
    num_items=9,
    num_behaviours=2,
    architecture="transformer",
    size=8,
    num_layers=2,
    num_heads=2,
    max_length=6,
    gap_edges=(1, 60, 3600),
    dropout=0.0,
    popularity_scale=2.0,
)
BOTH = pytest.mark.parametrize("architecture", ["transformer", "gru"])


def model(**changes: object) -> SequenceModel:
    """With weights of ordinary size, so that every part of the model matters."""
    spec = dataclasses.replace(SPEC, **changes)
    made = SequenceModel(spec)
    load_weights(made, initial_weights_of(made, 1))
    return refilled(made, numbers(3, torch.float32))


def histories(lengths, *, num_items=9, num_behaviours=2, seed=0, timed=True, told=True) -> Histories:
    """Users of different pairs of item and behaviour, with gaps in every bucket."""
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(num_items * num_behaviours)[:length] for length in lengths]
    return Histories.from_rows(
        [row // num_behaviours for row in pairs],
        num_items,
        timestamps=[np.cumsum(rng.choice([0, 5, 100, 9999], length)) for length in lengths] if timed else None,
        behaviours=[row % num_behaviours for row in pairs] if told else None,
    )


def losses(made: SequenceModel, users: Events) -> torch.Tensor:
    return made.loss(users, share_done=0.0, chance=Chance.seeded(0))


@BOTH
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_dp_sgd_sums_what_a_loop_over_users_sums(architecture, engine):
    users = histories([0, 1, 2, 6, 6, 5, 3, 0, 6], seed=4)
    scales = 10.0 ** numbers(5, torch.float64)(users.num_users)  # gradients from far below the clip to far above it

    def scaled(module, positions):
        batch = module.encode(users).batch(positions.numpy())
        return scales[positions] * losses(module, batch)

    case = Case(refilled(model(architecture=architecture), numbers(6, torch.float64)), scaled)
    everyone = range(users.num_users)
    expected, largest = by_hand(case, everyone)
    assert largest_gap(released(ENGINES[engine], case, everyone), expected) <= 1e-11 * largest


@BOTH
def test_a_users_loss_is_its_own(architecture):
    made = model(architecture=architecture)
    encoded = made.encode(histories([0, 1, 6, 3, 5]))
    with torch.no_grad():
        among = losses(made, encoded.batch(np.arange(5)))
        alone = [losses(made, encoded.batch(np.array([user]))) for user in range(5)]
        turned = losses(made, encoded.batch(np.arange(5)[::-1].copy()))
    assert among[0] == 0.0  # nothing happened, nothing to learn
    assert torch.allclose(among, torch.cat(alone), atol=1e-5)
    assert torch.allclose(among, turned.flip(0), atol=1e-5)


@BOTH
def test_padding_does_not_matter(architecture):
    made = model(architecture=architecture)
    users = made.encode(histories([1, 3, 4])).batch(np.arange(3))

    def wider(values: torch.Tensor, padding: int) -> torch.Tensor:
        whole = torch.full((3, 6), padding)
        whole[:, :4] = torch.where(users.inside, values, padding)
        return whole

    padded = Events(wider(users.items, 7), wider(users.behaviours, 1), wider(users.gaps, 2), users.lengths)
    with torch.no_grad():
        assert torch.allclose(losses(made, users), losses(made, padded), atol=1e-5)
        shorter = dataclasses.replace(padded, lengths=users.lengths - 1)
        assert not torch.allclose(losses(made, users), losses(made, shorter), atol=1e-2)  # of events it would


@BOTH
def test_an_event_changes_no_earlier_prediction(architecture):
    made = model(architecture=architecture)
    users = made.encode(histories([6])).batch(np.arange(1))
    with torch.no_grad():
        before = torch.stack(made._log_likelihoods(users, lambda values: values))
        for place in range(6):
            for name, number in (("items", SPEC.num_items), ("behaviours", 2), ("gaps", 3)):
                values = getattr(users, name).clone()
                values[0, place] = (values[0, place] + 1) % number
                moved = torch.stack(
                    made._log_likelihoods(dataclasses.replace(users, **{name: values}), lambda values: values)
                )
                assert torch.allclose(moved[:, :, :place], before[:, :, :place], atol=1e-6)
                if 0 < place < 5:  # and later ones it does: the event is read
                    assert not torch.allclose(moved[0, 0, place + 1 :], before[0, 0, place + 1 :], atol=1e-4)


def test_the_likelihood_and_its_gradient_are_those_of_a_masked_softmax(monkeypatch):
    monkeypatch.setattr("shared.generators.sequence_likelihood._CHUNK", 100)  # two users at a time
    users = model().encode(histories([6, 0, 5, 6, 1])).batch(np.arange(5))
    weights = numbers(8, torch.float64)(5, 6)
    logits = numbers(9, torch.float64)(5, 6, 9).requires_grad_()
    again = numbers(7, torch.float64)(5, 6).requires_grad_()
    found = next_item_log_likelihood(logits, users, Taken.before(users, 2), again)
    gradients = torch.autograd.grad((found * weights)[users.inside].sum(), (logits, again))
    masked = logits.clone()
    for user, length in enumerate(users.lengths.tolist()):
        row = users.items[user, :length].tolist()
        for place in range(length):
            for item in set(row[:place]):
                gone = row[:place].count(item) == 2
                masked[user, place, item] = -torch.inf if gone else masked[user, place, item] + again[user, place]
    inside = users.inside
    expected = torch.log_softmax(masked, dim=2).gather(2, users.items[:, :, None])[:, :, 0]
    assert torch.isinf(masked).sum() > 3
    assert torch.allclose(found[inside], expected[inside], atol=1e-12)
    slow = torch.autograd.grad((expected * weights)[inside].sum(), (logits, again))
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(gradients, slow, strict=True))


def sequences(made: SequenceModel, length: int) -> tuple[list[tuple[tuple[int, int], ...]], np.ndarray]:
    """All sequences of ``length`` different pairs of item and behaviour, and their log-probabilities."""
    spec = made.spec
    pairs = list(itertools.product(range(spec.num_items), range(spec.num_behaviours)))
    every = list(itertools.permutations(pairs, length))
    users = Histories.from_rows(
        [[item for item, _ in row] for row in every],
        spec.num_items,
        behaviours=[[behaviour for _, behaviour in row] for row in every],
    )
    with torch.no_grad():
        total = -losses(made, made.encode(users).batch(np.arange(len(every)))) * length
    return every, total.double().numpy()


@BOTH
@pytest.mark.parametrize("num_behaviours", [1, 2])
def test_sequences_without_repeats_share_the_whole_probability(architecture, num_behaviours):
    # The times are not given, so what is summed over is items and behaviours: a distribution, if repeats have no part.
    made = model(architecture=architecture, num_items=3, num_behaviours=num_behaviours)
    for length in (1, 2, 3):
        _, logarithms = sequences(made, length)
        assert np.exp(logarithms).sum() == pytest.approx(1.0, abs=1e-5)


def frequencies(drawn: Histories, every: list[tuple[tuple[int, int], ...]]) -> np.ndarray:
    codes = np.zeros_like(drawn.items) if drawn.behaviours is None else drawn.behaviours
    width = len(every[0])
    rows = np.stack([drawn.items, codes], axis=1).reshape(-1, width, 2).tolist()
    position = {row: number for number, row in enumerate(every)}
    return np.bincount([position[tuple(map(tuple, row))] for row in rows], minlength=len(every)) / drawn.num_users


def misfit(found: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's chi-square of 20,000 draws, as standard deviations above its mean; rare kinds count together."""
    rare = expected * 20_000 < 20
    shares = [np.append(part[~rare], part[rare].sum()) for part in (found, np.asarray(expected))]
    square = 20_000 * ((shares[0] - shares[1]) ** 2 / np.maximum(shares[1], 1e-4)).sum()
    degrees = (~rare).sum()
    return float((square - degrees) / sqrt(2 * degrees))


@BOTH
@pytest.mark.parametrize("num_behaviours", [1, 2])
def test_users_are_drawn_in_proportion_to_their_probability(architecture, num_behaviours):
    made = model(architecture=architecture, num_items=4, num_behaviours=num_behaviours, gap_edges=())
    every, logarithms = sequences(made, 3)
    expected = np.exp(logarithms)
    drawn = made.draw(np.full(20_000, 3), generator=torch.Generator().manual_seed(7))
    assert misfit(frequencies(drawn, every), expected) < 5
    tilt = np.array([0.5, 0, 0, 0], np.float32)
    tilted = made.draw(np.full(20_000, 3), generator=torch.Generator().manual_seed(7), tilt=tilt)
    assert misfit(frequencies(tilted, every), expected) > 10  # a small tilt is seen


@BOTH
def test_each_draw_is_made_from_the_probability_that_the_likelihood_knows(architecture, monkeypatch):
    made = model(architecture=architecture, num_items=60, max_length=4)
    with torch.no_grad():
        made.again.weight.zero_()  # of what was taken before a window too, which its likelihood cannot know
        made.again.bias.zero_()
    asked: list[torch.Tensor] = []

    def recording(logits, generator):
        codes = _drawn(logits, generator)
        asked.append(torch.log_softmax(logits, 1).gather(1, codes[:, None])[:, 0])
        return codes

    monkeypatch.setattr("shared.generators.sequence._drawn", recording)
    drawn = made.draw(np.full(40, 8), generator=torch.Generator().manual_seed(1))
    places, rows, first = np.tile(np.arange(8), 40), drawn.items.reshape(40, 8), 0
    for place in range(8):
        if architecture == "transformer" and place - first == 4:
            first = place - 2  # a full window: on from its newest half
        window = drawn.keep((places >= first) & (places <= place))
        with torch.no_grad():
            of_items, of_rest = made._log_likelihoods(made.encode(window).batch(np.arange(40)), lambda v: v)
        item, behaviour, gap = asked[3 * place : 3 * place + 3]
        # Who took no item twice has none excluded, inside the window or before it.
        free = torch.tensor([len(set(row[: place + 1].tolist())) == place + 1 for row in rows])
        assert free.sum() > 5
        assert torch.allclose(of_items[free, -1], item[free], atol=1e-4)
        assert torch.allclose(of_rest[free, -1], (behaviour + gap if place else behaviour)[free], atol=1e-4)


@BOTH
def test_times_between_events_follow_their_buckets(architecture):
    edges = (1, 60, 3600)
    made = model(architecture=architecture, gap_edges=edges)
    # One place tells the bucket's distribution: the gap of a second event, given its behaviour, whatever came first.
    drawn = made.draw(np.full(20_000, 2), generator=torch.Generator().manual_seed(3))
    buckets = drawn.gap_buckets(edges)[1::2]
    encoded = made.encode(drawn)
    expected = np.zeros((len(buckets), 3))
    with torch.no_grad():
        for bucket in range(3):
            users = dataclasses.replace(encoded, gaps=np.where(encoded.gaps < 0, -1, bucket)).batch(np.arange(20_000))
            untimed = dataclasses.replace(users, gaps=torch.full_like(users.gaps, -1))
            difference = made._log_likelihoods(users, lambda v: v)[1] - made._log_likelihoods(untimed, lambda v: v)[1]
            expected[:, bucket] = difference[:, 1].exp().double().numpy()
    assert np.allclose(expected.sum(1), 1.0, atol=1e-5)
    shares = np.bincount(buckets, minlength=3) / len(buckets)
    assert np.abs(shares - expected.mean(0)).max() < 5 * sqrt(0.25 / 20_000)
    gaps = np.diff(drawn.timestamps)[::2]
    assert (gaps[buckets == 0] == 0).all()
    # Log-uniform in [1, 60) and [60, 3600): as many below the root of both ends (of one second more) as above.
    for bucket, middle in ((1, sqrt(2 * 61) - 1), (2, sqrt(61 * 3601) - 1)):
        inside = gaps[buckets == bucket]
        assert abs((inside < middle).mean() - 0.5) < 5 * sqrt(0.25 / len(inside)) + 0.02  # whole seconds: a bit off


lengths_of_users = st.lists(st.integers(1, 9), max_size=6)


@settings(max_examples=30, deadline=None)
@given(
    lengths=lengths_of_users,
    architecture=st.sampled_from(["transformer", "gru"]),
    num_behaviours=st.integers(1, 2),
    edges=st.sampled_from([(), (1, 60), (3600,)]),
    max_length=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_drawn_users_are_histories(lengths, architecture, num_behaviours, edges, max_length, seed):
    made = model(
        architecture=architecture, num_behaviours=num_behaviours, gap_edges=edges, max_length=max_length, size=4
    )
    given = np.array(lengths, dtype=np.int64)
    drawn, again = (made.draw(given, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert drawn.lengths().tolist() == lengths  # in the order asked for, also beyond the window
    assert drawn.items.tolist() == again.items.tolist()
    assert (drawn.behaviours is not None) == (num_behaviours > 1 and len(lengths) > 0)
    assert (drawn.timestamps is not None) == (bool(edges) and len(lengths) > 0)
    for user in range(drawn.num_users):
        own = drawn.select([user])
        codes = [0] * len(own.items) if own.behaviours is None else own.behaviours.tolist()
        assert len(set(zip(own.items.tolist(), codes, strict=True))) == lengths[user]
        assert set(codes) <= set(range(num_behaviours))
        if own.timestamps is not None:
            assert own.timestamps[0] == 0
            assert (np.diff(own.timestamps) >= 0).all()
            assert np.diff(own.timestamps).max(initial=0) < edges[-1]


def test_another_seed_draws_other_users():
    one, other = (model().draw(np.full(50, 5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert one.items.tolist() != other.items.tolist()


def test_many_users_are_drawn_in_blocks_and_stay_in_place(monkeypatch):
    lengths = np.array([1, 5, 2, 4, 3] * 4)
    monkeypatch.setattr("shared.generators.sequence._USERS_AT_ONCE", 3)
    assert model().draw(lengths, generator=torch.Generator().manual_seed(1)).lengths().tolist() == lengths.tolist()


def test_a_tilt_moves_what_is_drawn():
    tilt = np.zeros(9, np.float32)
    tilt[4] = 30.0
    drawn = model().draw(np.full(20, 2), generator=torch.Generator().manual_seed(1), tilt=tilt)
    assert (drawn.items.reshape(20, 2) == 4).all()  # in both of its behaviours


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_window_is_a_run_of_the_users_events(lengths, size, seed):
    users = model().encode(histories(lengths)).batch(np.arange(len(lengths)))
    seen = users.window(size, Chance.seeded(seed))
    assert seen.lengths.tolist() == [min(length, size) for length in lengths]
    for user, length in enumerate(lengths):
        runs = [
            [part[user, first : first + size].tolist() for part in (users.items, users.behaviours, users.gaps)]
            for first in range(max(1, length - size + 1))
        ]
        shown = min(length, size)
        if shown:
            runs = [[items[:shown], codes[:shown], [-1, *gaps[1:shown]]] for items, codes, gaps in runs]
            assert [part[user, :shown].tolist() for part in (seen.items, seen.behaviours, seen.gaps)] in runs


def test_every_window_of_a_user_is_as_likely():
    rows = Histories.from_rows([np.arange(9)] * 4000, 9)
    first = model(num_behaviours=1).encode(rows).batch(np.arange(4000)).window(6, Chance.seeded(1)).items[:, 0]
    shares = np.bincount(first.numpy(), minlength=4) / 4000
    assert len(shares) == 4  # 9 events hold 4 runs of 6
    assert np.abs(shares - 0.25).max() < 5 * sqrt(0.25 * 0.75 / 4000)


def test_without_time_or_behaviours_there_is_one_of_each():
    made = model()
    told = histories([3, 4], num_behaviours=1)
    untold = dataclasses.replace(told, timestamps=None, behaviours=None)
    untimed = dataclasses.replace(told, timestamps=None)
    with torch.no_grad():
        batches = [made.encode(part).batch(np.arange(2)) for part in (untold, untimed)]
        assert torch.equal(losses(made, batches[0]), losses(made, batches[1]))
    made.zero_grad()
    losses(made, batches[0]).sum().backward()
    assert made.to_gaps.weight.grad is not None
    assert not made.to_gaps.weight.grad.any()  # unknown times teach nothing


@BOTH
def test_dropout_takes_its_chance_from_the_argument_alone(architecture):
    made = model(architecture=architecture, dropout=0.5)
    users = made.encode(histories([5, 5])).batch(np.arange(2))
    with torch.no_grad():
        torch.manual_seed(1)
        one = made.loss(users, share_done=0.0, chance=Chance.seeded(1))
        torch.manual_seed(2)
        assert torch.equal(one, made.loss(users, share_done=0.0, chance=Chance.seeded(1)))
        assert not torch.equal(one, made.loss(users, share_done=0.0, chance=Chance.seeded(2)))


def test_behaviours_that_the_generator_does_not_know_are_left_out_and_tell_nobody():
    known, more = histories([9]), histories([9])
    assert more.behaviours.max() == 1
    encoded = model(num_behaviours=1).encode(more)
    assert encoded.histories.items.tolist() == known.items[known.behaviours == 0].tolist()


def test_a_batch_is_as_wide_whoever_is_in_it():
    short, long = histories([2, 3]), histories([2, 3, 9])
    made = model(max_length=6)
    for part, drawn in ((short, [0, 1]), (long, [0, 1, 2])):
        window = made.encode(part).batch(np.array(drawn)).window(6, Chance.seeded(1))
        assert window.items.shape == (len(drawn), 6)
        assert window.lengths.tolist()[:2] == [2, 3]
        assert not window.items[0, 2:].any()


def test_histories_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"of 8 items .* generator of 9"):
        model().encode(histories([3], num_items=8))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_behaviours": 128}, "from 1 to 127"),
        ({"architecture": "lstm"}, "transformer, gru"),
        ({"num_heads": 3}, "size 8 cannot be shared by num_heads 3"),
        ({"gap_edges": (1, 1)}, "rising whole seconds"),
        ({"gap_edges": (0, 5)}, "rising whole seconds"),
        ({"gap_edges": (1.5,)}, "rising whole seconds"),
        ({"gap_edges": (True, 5)}, "rising whole seconds"),
        ({"gap_edges": 5}, "rising whole seconds"),
        ({"gap_edges": (10**18,)}, "rising whole seconds"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_specs_out_of_range_are_refused(changes, advice):
    with pytest.raises(InputError, match=advice):
        dataclasses.replace(SPEC, **changes)


def test_a_spec_survives_json():
    assert SequenceSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


@BOTH
def test_it_learns_what_follows_what(architecture):
    # A cycle of items, walked from anywhere, at a steady pace: no popularity, all order.
    rng = np.random.default_rng(0)
    rows = [(np.arange(6) + start) % 12 for start in rng.integers(0, 12, 256)]
    users = Histories.from_rows(rows, 12, timestamps=[np.arange(6) * 100] * 256)
    made = model(architecture=architecture, num_items=12, num_behaviours=1, num_layers=1, size=16)
    load_weights(made, initial_weights_of(made, 0))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    encoded = made.encode(users)
    for _ in range(60):
        optimizer.zero_grad()
        losses(made, encoded.batch(rng.integers(0, 256, 64))).mean().backward()
        optimizer.step()
    drawn = made.draw(np.full(200, 6), generator=torch.Generator().manual_seed(1))
    follows = np.diff(drawn.items.reshape(200, 6), axis=1) % 12 == 1
    assert follows.mean() > 0.95  # at random 1 in 11 would
    assert (drawn.gap_buckets((1, 60, 3600)).reshape(200, 6)[:, 1:] == 2).mean() > 0.99


def shoppers(num_users: int, *, seed: int) -> Histories:
    """Users of one taste each, who also buy what everyone buys, come back days later, and return some of it."""
    rng = np.random.default_rng(seed)
    rows: list[list[tuple[int, int, int]]] = []
    for taste in rng.integers(0, 3, num_users):
        row: list[tuple[int, int, int]] = []
        for _ in range(rng.integers(8, 16)):
            second = (row[-1][0] if row else 0) + 86_400 * int(rng.random() < 0.3)
            bought = [item for _, item, code in row if code == 0 and (item, 1) not in {event[1:] for event in row}]
            new = [item for item in range(20 * taste, 20 * taste + 20) if (item, 0) not in {event[1:] for event in row}]
            shared = [item for item in range(60, 80) if (item, 0) not in {event[1:] for event in row}]
            if bought and rng.random() < 0.15:
                row.append((second, int(rng.choice(bought)), 1))
            else:
                row.append((second, int(rng.choice(shared if rng.random() < 0.6 else new)), 0))
        rows.append(row)
    return Histories.from_rows(
        [[item for _, item, _ in row] for row in rows],
        80,
        timestamps=[[second for second, _, _ in row] for row in rows],
        behaviours=[[code for _, _, code in row] for row in rows],
    )


@BOTH
def test_it_beats_a_markov_chain_and_draws_users_like_those_it_learnt_from(architecture):
    # What everyone buys hides the taste from a chain that sees one item back; to remember it is the model's part.
    train, unseen = shoppers(800, seed=1), shoppers(200, seed=2)
    made = model(
        architecture=architecture, num_items=80, num_layers=1, size=16, max_length=16, gap_edges=(1, 3600, 172_800)
    )
    load_weights(made, initial_weights_of(made, 0))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    encoded, rng = made.encode(train), np.random.default_rng(0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        optimizer.zero_grad()
        losses(made, encoded.batch(rng.integers(0, 800, 64))).mean().backward()
        optimizer.step()
    ours = made.next_item_log_likelihood(unseen)
    chain = markov_log_likelihood(train, unseen, occurrences=2)
    difference = ours - chain
    assert difference.mean() > 5 * difference.std() / sqrt(len(difference))
    # Ten times as many as are compared at a time, so that one lucky or unlucky sample does not decide.
    drawn = made.draw(np.tile(unseen.lengths(), 5), generator=torch.Generator().manual_seed(1))
    found = fidelity(unseen, drawn, gap_edges=(1, 3600, 172_800), rng=np.random.default_rng(0))
    for name in ("popularity", "bigrams", "gaps", "behaviours", "transitions"):
        assert found[name].distance < 1.5 * found[name].ceiling, (name, found[name])
