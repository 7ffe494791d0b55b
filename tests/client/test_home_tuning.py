"""A generator tuned at home: better for its owner's users, and never exportable again."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.home_tuning import fine_tune, save_tuned
from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import InputError, RefusedError
from shared.generators.base import Weights
from shared.generators.card import TUNED_AT_HOME, Generator, load_generator, save_generator
from shared.generators.family import initial_weights, model_from
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE
from tests.contracts.generators import SPECS
from tests.shared.generators.test_card import ITEMS, card
from tests.shared.generators.test_multvae import SPEC

TRAINED = tuple(form for form, spec in SPECS.items() if spec.kind != "spectral")


def users(count: int = 60) -> Histories:
    """Each has six items of one half of the catalogue."""
    rng = np.random.default_rng(0)
    half = SPEC.num_items // 2
    return Histories.from_rows(
        [np.sort(half * (user % 2) + rng.choice(half, 6, replace=False)) for user in range(count)], SPEC.num_items
    )


@pytest.fixture
def received(tmp_path) -> Generator:
    save_generator(tmp_path / "received", initial_weights(SPEC, 3), card(), ITEMS)
    return load_generator(tmp_path / "received")


def tuned(generator: Generator, **changes: object) -> Weights:
    terms: dict[str, object] = {"steps": 40, "learning_rate": 0.01, "users_per_step": 32, "seed": 0}
    return fine_tune(generator, users(), **{**terms, **changes})


def loss(weights: Weights, histories: Histories) -> float:
    """Mean over 50 draws of every user's latent."""
    model = model_from(SPEC, weights)
    everyone = np.tile(np.arange(histories.num_users), 50)
    batch = model.encode(histories).batch(everyone)
    return float(model.loss(batch, share_done=1.0, chance=Chance.seeded(1)).mean().detach())


def weights_of(generator: Generator) -> Weights:
    return {name: value.numpy().copy() for name, value in generator.model.state_dict().items()}


def test_tuning_lowers_the_loss_on_the_owners_users(received):
    before = weights_of(received)
    # Of a uniform model the loss is log 30 = 3.4, and of one that knows the halves log 15 = 2.7.
    assert loss(tuned(received), users()) < loss(before, users()) - 0.2
    assert loss(tuned(received, learning_rate=1e-9), users()) > loss(before, users()) - 0.001


def test_the_received_generator_stays_as_it_was_and_a_seed_repeats(received):
    before = weights_of(received)
    first, again, other = tuned(received), tuned(received), tuned(received, seed=1)
    assert all(np.array_equal(before[name], value) for name, value in weights_of(received).items())
    assert all(np.array_equal(first[name], value) for name, value in again.items())
    assert any(not np.array_equal(first[name], value) for name, value in other.items())
    assert list(first) == list(before)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.sampled_from([LOCAL_NOISE, SEEDED_NOISE, NO_NOISE, TUNED_AT_HOME]),
    epsilon=st.sampled_from([0.1, 8.0, math.inf]),
    times=st.integers(1, 3),
)
def test_a_tuned_generator_is_never_exportable_again(tmp_path, noise, epsilon, times):
    # Whatever was received, tuned and saved and loaded any number of times; the copy of its card says so too.
    folder = tmp_path / "generator"
    save_generator(folder, initial_weights(SPEC, 3), card(noise=noise, epsilon=epsilon), ITEMS)
    for _ in range(times):
        generator = load_generator(folder)
        identity = save_tuned(folder, generator, fine_tune(generator, users(4), steps=1, learning_rate=0.01, seed=0))
        loaded = load_generator(folder)
        assert not loaded.card.exportable
        assert (loaded.card.noise, loaded.card.epsilon) == (TUNED_AT_HOME, math.inf)
        assert json.loads((folder / "card.json").read_text())["exportable"] is False
        assert loaded.generator_id == identity != generator.generator_id


def test_either_mark_alone_keeps_it_at_home(received):
    assert received.card.exportable
    assert not dataclasses.replace(received.card, noise=TUNED_AT_HOME).exportable
    assert not dataclasses.replace(received.card, epsilon=math.inf).exportable


@pytest.mark.parametrize("form", TRAINED)
def test_every_kind_with_a_loss_is_tuned_and_stays(tmp_path, form):
    spec = SPECS[form]
    histories = Histories.from_rows([[0, 1, 2], [1, 2], [2, 0, 3, 1], [3]] * 3, spec.num_items)
    catalogue = {**card().catalogue, "num_items": spec.num_items}
    terms = dataclasses.replace(card(), spec=spec, catalogue=catalogue)
    save_generator(tmp_path / "received", initial_weights(spec, 3), terms, ITEMS[: spec.num_items])
    generator = load_generator(tmp_path / "received")
    weights = fine_tune(generator, histories, steps=3, learning_rate=0.01, seed=0)
    assert any(not np.array_equal(weights[name], value) for name, value in weights_of(generator).items())
    save_tuned(tmp_path / "tuned", generator, weights)
    assert not load_generator(tmp_path / "tuned").card.exportable


def test_a_kind_without_a_loss_is_refused_with_the_reason(received):
    spec = next(spec for spec in SPECS.values() if spec.kind == "spectral")
    spectral = dataclasses.replace(received, card=dataclasses.replace(received.card, spec=spec))
    with pytest.raises(RefusedError, match=r"has no loss.*tune a generator that was trained in rounds"):
        tuned(spectral)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"steps": 0}, "at least one of each"),
        ({"users_per_step": 0}, "at least one of each"),
        ({"learning_rate": 0.0}, "learning rate above 0"),
        ({"learning_rate": math.nan}, "learning rate above 0"),
        ({"learning_rate": 1e30}, "Lower it"),
    ],
)
def test_numbers_out_of_range_are_refused(received, changes, advice):
    with pytest.raises(InputError, match=advice):
        tuned(received, **changes)


def test_users_that_do_not_fit_are_refused(received):
    terms = {"steps": 1, "learning_rate": 0.01, "seed": 0}
    with pytest.raises(InputError, match="has 31 items, the generator's 30"):
        fine_tune(received, Histories.from_rows([[0, 1]], 31), **terms)
    with pytest.raises(InputError, match="out of 0"):
        fine_tune(received, Histories.from_rows([], 30), **terms)
