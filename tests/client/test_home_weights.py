"""Weights that never leave: found again by round, the same for everyone at first."""

from dataclasses import replace

import numpy as np
import pytest

from client.store import home_weights
from client.store.home_weights import home_names, load_home_weights, save_home_weights
from shared.errors import InputError
from shared.generators.family import initial_weights, travelling_shapes, weight_shapes
from tests.contracts.generators import SPECS
from tests.small_federation import SPEC

LOCAL = replace(SPECS["gan"], discriminators="local")


def some(value: float) -> dict[str, np.ndarray]:
    return {name: np.full(weight_shapes(LOCAL)[name], value, dtype=np.float32) for name in home_names(LOCAL)}


def test_what_does_not_travel_stays():
    assert home_names(SPEC) == ()
    assert set(home_names(LOCAL)) | set(travelling_shapes(LOCAL)) == set(weight_shapes(LOCAL))
    assert home_names(LOCAL)
    assert all(name.startswith("discriminator.") for name in home_names(LOCAL))


def test_every_owner_begins_alike(tmp_path):
    first = load_home_weights(tmp_path, "a-run", LOCAL, before_round=1, first_round=1)
    public = initial_weights(LOCAL, 0)
    assert list(first) == list(home_names(LOCAL))
    assert all(np.array_equal(value, public[name]) for name, value in first.items())
    assert load_home_weights(tmp_path, "a-run", SPEC, before_round=1, first_round=1) == {}


def test_a_round_goes_on_from_the_one_before_it_also_when_asked_again(tmp_path):
    for server_round in (1, 2, 3):
        save_home_weights(tmp_path, "a-run", some(float(server_round)), server_round=server_round)
    for before, expected in ((4, 3.0), (3, 2.0), (2, 1.0)):
        found = load_home_weights(tmp_path, "a-run", LOCAL, before_round=before, first_round=1)
        assert all((value == expected).all() for value in found.values())
    again = load_home_weights(tmp_path, "a-run", LOCAL, before_round=1, first_round=1)
    assert not any((value == 1.0).all() for value in again.values())
    with pytest.raises(InputError, match="take part in a new run"):  # which is another run's, not this one's
        load_home_weights(tmp_path, "another-run", LOCAL, before_round=4, first_round=1)


def test_rounds_are_in_the_order_of_their_numbers(tmp_path):
    for server_round in (99_999, 100_000, 100_001):
        save_home_weights(tmp_path, "a-run", some(server_round / 1e5), server_round=server_round)
    found = load_home_weights(tmp_path, "a-run", LOCAL, before_round=100_002, first_round=1)
    assert all(np.allclose(value, 1.00001, rtol=1e-6) for value in found.values())


def test_old_rounds_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(home_weights, "_KEPT_ROUNDS", 2)
    for server_round in range(1, 6):
        save_home_weights(tmp_path, "a-run", some(1.0), server_round=server_round)
    assert sorted(path.stem for path in tmp_path.rglob("*.safetensors")) == ["00004", "00005"]


def test_a_damaged_file_is_not_replaced_by_a_beginning(tmp_path):
    save_home_weights(tmp_path, "a-run", some(1.0), server_round=1)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match="Restore"):
        load_home_weights(tmp_path, "a-run", LOCAL, before_round=2, first_round=1)
