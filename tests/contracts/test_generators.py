"""What every kind of generator keeps, whatever it is made of."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import client.train_generator
from client.train_generator import chance_for, train_generator
from shared.data.histories import Histories
from shared.dpsgd.attach import attach
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.base import Spec, Weights
from shared.generators.card import GeneratorCard, load_generator, save_generator
from shared.generators.family import (
    KINDS,
    build_model,
    initial_weights,
    model_from,
    spec_from_dict,
    travelling_shapes,
    weight_shapes,
)
from shared.privacy.releases import DpSgdRelease
from shared.rng import stream
from shared.wire.plan import RoundPlan
from tests.contracts.generators import NUM_ITEMS, SPECS

TRAINED = tuple(kind for kind, spec in SPECS.items() if spec.kind != "spectral")
CLIP, RATE = 0.7, 0.5


def some_histories(num_users: int = 12) -> Histories:
    rng = stream(1, "contract", "histories")
    rows = [rng.choice(NUM_ITEMS, size=rng.integers(1, 9), replace=False) for _ in range(num_users)]
    return Histories.from_rows(rows, NUM_ITEMS)


def weights_of(kind: str, seed: int = 3) -> Weights:
    return initial_weights(SPECS[kind], seed)


def drawn(kind: str, lengths: list[int], *, seed: int = 0, tilt: Any = None) -> Histories:
    model = model_from(SPECS[kind], weights_of(kind))
    return model.draw(np.array(lengths), generator=torch.Generator().manual_seed(seed), tilt=tilt)


def plan_of(*, noise_multiplier: float = 1e-12, num_steps: int = 1, sample_rate: float = 1.0) -> RoundPlan:
    release = DpSgdRelease(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, num_steps=num_steps, max_users=20
    )
    return RoundPlan(
        server_round=1,
        num_rounds=2,
        num_owners=2,
        num_steps=num_steps,
        sample_rate=sample_rate,
        max_users=20,
        max_grad_norm=CLIP,
        learning_rate=RATE,
        proximal_mu=0.0,
        release=release,
    )


def trained(kind: str, histories: Histories, plan: RoundPlan, *, seed: int = 5) -> Weights:
    return train_generator(weights_of(kind), histories, SPECS[kind], plan, noise_seed=seed, owner="shop").weights


class Steady(Chance):
    """The same numbers at every call, from the first on: one user more at the end changes nobody else's draws."""

    def uniform(self, count):
        return stream(2, "steady", "uniform").random(count)

    def fill_normal(self, values, *, stddev):
        numbers = stream(2, "steady", "normal").standard_normal(values.numel())
        values.copy_(torch.from_numpy(stddev * numbers).reshape(values.shape))


def test_every_kind_is_held_to_this_contract():
    assert {spec.kind for spec in SPECS.values()} == set(KINDS)


@pytest.mark.parametrize("kind", SPECS)
class TestEveryKind:
    def test_specs_survive_json_and_refuse_the_unknown(self, kind):
        spec = SPECS[kind]
        assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        with pytest.raises(InputError, match="depth"):
            spec_from_dict({**spec.to_dict(), "depth": 3})
        fields = {name: value for name, value in spec.to_dict().items() if name != "num_items"}
        with pytest.raises(InputError, match="num_items"):
            spec_from_dict(fields)

    def test_no_size_is_without_an_end(self, kind):
        spec = SPECS[kind]
        for name, value in spec.to_dict().items():
            if isinstance(value, bool | str | tuple):
                continue
            for hostile in (10**12, -1, float("nan"), float("inf"), "3", None):
                with pytest.raises(InputError, match=name):
                    replace(spec, **{name: hostile})
        for name in spec.CHOICES:
            with pytest.raises(InputError, match=name):
                replace(spec, **{name: "anything"})

    def test_initial_weights_are_a_function_of_the_seed(self, kind):
        one, again, other = weights_of(kind, 1), weights_of(kind, 1), weights_of(kind, 2)
        assert list(one) == list(again) == list(weight_shapes(SPECS[kind]))
        assert all(np.array_equal(one[name], again[name]) for name in one)
        assert any(not np.array_equal(one[name], other[name]) for name in one)
        assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in one.values())

    def test_what_travels_is_some_of_the_weights_in_their_order(self, kind):
        shapes, travelling = weight_shapes(SPECS[kind]), travelling_shapes(SPECS[kind])
        assert travelling
        assert [name for name in shapes if name in travelling] == list(travelling)
        assert all(shapes[name] == shape for name, shape in travelling.items())

    def test_weights_that_do_not_fit_are_refused(self, kind):
        weights = weights_of(kind)
        name = next(iter(weights))
        with pytest.raises(InputError, match="first difference"):
            model_from(SPECS[kind], {**weights, name: np.zeros(3, dtype=np.float32)})
        with pytest.raises(InputError, match="not finite"):
            model_from(SPECS[kind], {**weights, name: np.full_like(weights[name], np.nan)})

    @given(lengths=st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=8), seed=st.integers(0, 20))
    @settings(max_examples=15, deadline=None)
    def test_users_have_the_lengths_asked_for_and_no_event_twice(self, kind, lengths, seed):
        found = drawn(kind, lengths, seed=seed)
        assert found.num_items == NUM_ITEMS  # that items lie below it is checked by Histories itself
        assert found.lengths().tolist() == lengths
        for user in range(found.num_users):
            part = slice(found.indptr[user], found.indptr[user + 1])
            behaviours = found.behaviours[part] if found.behaviours is not None else np.zeros(lengths[user])
            assert len(set(zip(found.items[part].tolist(), behaviours.tolist(), strict=True))) == lengths[user]

    def test_the_same_seed_draws_the_same_users(self, kind):
        one, again, other = (drawn(kind, [5] * 30, seed=seed) for seed in (1, 1, 2))
        assert np.array_equal(one.items, again.items)
        assert not np.array_equal(one.items, other.items)

    def test_a_tilt_lifts_an_item(self, kind):
        tilt = np.zeros(NUM_ITEMS, dtype=np.float32)
        tilt[3] = 20.0  # odds of e^20: it is there, whatever the weights
        assert (drawn(kind, [1] * 50, tilt=tilt).items == 3).all()

    def test_what_is_saved_draws_what_it_drew(self, kind, tmp_path):
        card = GeneratorCard(
            spec=SPECS[kind],
            catalogue={"hash": "abc", "version": "v1", "source": "public", "num_items": NUM_ITEMS},
            epsilon=8.0,
            delta=1e-5,
            noise="local",
            privacy_unit="user",
            releases={"shop": []},
            max_items_per_user=20,
        )
        save_generator(tmp_path, weights_of(kind), card, tuple(map(str, range(NUM_ITEMS))))
        loaded = load_generator(tmp_path)
        assert loaded.card == card
        again = loaded.model.draw(np.array([4] * 20), generator=torch.Generator().manual_seed(7))
        assert np.array_equal(again.items, drawn(kind, [4] * 20, seed=7).items)


@pytest.mark.parametrize("kind", TRAINED)
class TestEveryKindThatTrains:
    def test_dp_sgd_can_clip_all_of_what_sees_users(self, kind):
        model = build_model(SPECS[kind])
        attach(model.private_part)  # refuses what it has no rule for
        assert not list(model.private_part.buffers())

    def test_every_user_has_one_finite_loss(self, kind):
        model, histories = model_from(SPECS[kind], weights_of(kind)), some_histories()
        before = (histories.indptr.copy(), histories.items.copy())
        batch = model.encode(histories).batch(np.array([0, 3, 11]))
        losses = model.loss(batch, share_done=0.5, chance=Chance.seeded(1))
        assert losses.shape == (len(batch),)
        assert torch.isfinite(losses).all()
        assert np.array_equal(before[0], histories.indptr)
        assert np.array_equal(before[1], histories.items)

    def test_training_is_repeatable_and_changes_the_weights(self, kind):
        plan = plan_of(noise_multiplier=0.5, num_steps=3, sample_rate=0.4)
        one, again, other = (trained(kind, some_histories(), plan, seed=seed) for seed in (5, 5, 6))
        assert all(np.array_equal(one[name], again[name]) for name in one)
        assert any(not np.array_equal(one[name], other[name]) for name in one)

    def test_steps_taken_are_steps_charged(self, kind):
        plan = plan_of(noise_multiplier=0.5, num_steps=3, sample_rate=0.4)
        result = train_generator(weights_of(kind), some_histories(), SPECS[kind], plan, noise_seed=5, owner="shop")
        assert result.release == plan.release

    def test_one_user_moves_what_sees_users_by_at_most_a_clip(self, kind, monkeypatch):
        # Whose draws are independent; here they are fixed, since the bound is on what the user itself adds.
        steady = Steady(bytes(32))
        chances = {"latent": steady, "apart-from-users": steady}
        monkeypatch.setattr(
            client.train_generator,
            "chance_for",
            lambda seed, owner, name, number: chances.get(name) or chance_for(seed, owner, name, number),
        )
        private = {name for name, _ in build_model(SPECS[kind]).private_part.named_parameters()}
        histories = some_histories()
        most = RATE * CLIP / plan_of().release.expected_batch
        moved = []
        for last in range(4, 12):
            with_user, without = (
                trained(kind, histories.select(np.arange(count)), plan_of()) for count in (last + 1, last)
            )
            difference = [
                (with_user[name] - without[name]).ravel()
                for name in with_user
                if any(name.endswith(p) for p in private)
            ]
            moved.append(float(np.linalg.norm(np.concatenate(difference))))
        assert max(moved) <= most * (1 + 1e-4)  # sums of float32 round in the sixth digit
        assert max(moved) > 0.2 * most  # the bound is one that users come near

    def test_a_round_without_anybody_is_noise_alone(self, kind):
        nobody = some_histories().select(np.array([], dtype=np.int64))
        plan = plan_of(noise_multiplier=0.5)
        result = trained(kind, nobody, plan)
        assert all(np.isfinite(value).all() for value in result.values())


def test_specs_of_an_unknown_kind_are_refused():
    with pytest.raises(InputError, match="unknown kind 'diffusion'"):
        spec_from_dict({"kind": "diffusion", "num_items": 3})
    with pytest.raises(InputError, match="unknown kind"):
        spec_from_dict({"num_items": 3})
    assert all(isinstance(spec, Spec) for spec in SPECS.values())
