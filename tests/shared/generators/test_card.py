"""A generator on disk: read back unchanged, refused when damaged."""

import dataclasses
import json
import math

import numpy as np
import pytest

from shared.errors import InputError
from shared.generators.card import GeneratorCard, load_generator, save_generator
from shared.generators.family import initial_weights
from shared.generators.lengths import LengthShares
from shared.privacy.noise import NO_NOISE, SEEDED_NOISE
from tests.shared.generators.test_multvae import SPEC

ITEMS = tuple(f"item {number}" for number in range(SPEC.num_items))


def card(*, epsilon: float = 8.0, noise: str = "local") -> GeneratorCard:
    return GeneratorCard(
        spec=SPEC,
        catalogue={"hash": "abc", "version": "v1", "source": "public", "num_items": SPEC.num_items},
        epsilon=epsilon,
        delta=1e-5,
        noise=noise,
        privacy_unit="user",
        releases={"shop": []},
        max_items_per_user=20,
    )


def test_a_card_may_tell_lengths_and_behaviours(tmp_path):
    told = dataclasses.replace(card(), lengths=LengthShares((1, 5), (0.25, 0.75)), behaviours=("view", "buy"))
    save_generator(tmp_path, initial_weights(SPEC, 5), told, ITEMS)
    assert load_generator(tmp_path).card == told


def test_what_is_saved_is_loaded(tmp_path):
    weights = initial_weights(SPEC, 5)
    identity = save_generator(tmp_path / "generator", weights, card(), ITEMS)
    loaded = load_generator(tmp_path / "generator")
    assert (loaded.card, loaded.generator_id, loaded.item_ids) == (card(), identity, ITEMS)
    state = loaded.model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("epsilon", "noise", "exportable"),
    [
        (8.0, "local", True),
        (8.0, SEEDED_NOISE, False),
        (math.inf, NO_NOISE, False),
        (math.inf, "local", False),
        (8.0, "Local", False),
    ],
)
def test_only_real_noise_makes_a_generator_exportable(tmp_path, epsilon, noise, exportable):
    save_generator(tmp_path, initial_weights(SPEC, 5), card(epsilon=epsilon, noise=noise), ITEMS)
    assert load_generator(tmp_path).card.exportable is exportable
    assert json.loads((tmp_path / "card.json").read_text())["exportable"] is exportable


def test_a_catalogue_read_off_the_data_is_not_exportable():
    assert card(noise="local").exportable
    assumed = {**card().catalogue, "source": "assumed public"}
    assert not dataclasses.replace(card(noise="local"), catalogue=assumed).exportable


def test_the_card_speaks_of_people_who_are_users_of_several_owners(tmp_path):
    save_generator(tmp_path, initial_weights(SPEC, 5), card(), ITEMS)
    assert "sum of their epsilons" in json.loads((tmp_path / "card.json").read_text())["privacy"]["people"]


def test_other_weights_under_the_same_card_are_refused(tmp_path):
    save_generator(tmp_path / "a", initial_weights(SPEC, 5), card(), ITEMS)
    save_generator(tmp_path / "b", initial_weights(SPEC, 6), card(), ITEMS)
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="not those of the card"):
        load_generator(tmp_path / "a")


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"card\.json is missing"):
        load_generator(tmp_path)
    save_generator(tmp_path, initial_weights(SPEC, 5), card(), ITEMS)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be read"):
        load_generator(tmp_path)
