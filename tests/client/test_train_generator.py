"""One round at an owner: repeatable, bounded, and nothing when it must not be."""

import dataclasses

import numpy as np
import pytest
import torch

from client.train_generator import train_generator
from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.family import initial_weights
from shared.generators.multvae import VaeSpec
from shared.privacy.releases import DpSgdRelease
from shared.wire.plan import RoundPlan

SPEC = VaeSpec(
    num_items=40,
    hidden_size=8,
    latent_size=4,
    prior="mixture",
    num_components=2,
    kl_weight=0.2,
    kl_anneal_share=0.5,
    dropout=0.2,
    popularity_scale=5.0,
)
WEIGHTS = initial_weights(SPEC, 0)
PLAN = RoundPlan(
    server_round=1,
    num_rounds=3,
    num_owners=3,
    num_steps=2,
    sample_rate=0.5,
    max_users=50,
    max_grad_norm=0.3,
    learning_rate=1.0,
    proximal_mu=0.0,
    release=DpSgdRelease(noise_multiplier=1.5, sample_rate=0.5, num_steps=2, max_users=50),
)


def users(count: int = 30) -> Histories:
    rng = np.random.default_rng(1)
    return Histories.from_rows([rng.choice(40, rng.integers(2, 12), replace=False) for _ in range(count)], 40)


def flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in weights.values()])


def test_one_seed_gives_one_result_and_no_seed_never_the_same():
    first, again = (train_generator(WEIGHTS, users(), SPEC, PLAN, noise_seed=3, owner="a") for _ in range(2))
    assert np.array_equal(flat(first.weights), flat(again.weights))
    secret = [train_generator(WEIGHTS, users(), SPEC, PLAN, noise_seed=None, owner="a") for _ in range(2)]
    assert not np.array_equal(flat(secret[0].weights), flat(secret[1].weights))


@pytest.mark.parametrize(("owner", "server_round"), [("b", 1), ("a", 2)])
def test_owners_and_rounds_never_share_noise(owner, server_round):
    nobody = users().select([])
    plan = dataclasses.replace(PLAN, server_round=server_round)
    one = train_generator(WEIGHTS, nobody, SPEC, PLAN, noise_seed=3, owner="a")
    other = train_generator(WEIGHTS, nobody, SPEC, plan, noise_seed=3, owner=owner)
    noise = [flat(result.weights) - flat(WEIGHTS) for result in (one, other)]
    # Independent normals: the correlation of n pairs has standard error 1/sqrt(n).
    assert abs(np.corrcoef(noise)[0, 1]) < 4 / np.sqrt(len(noise[0]))


def test_the_release_has_the_noise_it_is_priced_for():
    nobody = users().select([])
    trained = train_generator(WEIGHTS, nobody, SPEC, PLAN, noise_seed=3, owner="a")
    moved = flat(trained.weights).astype(np.float64) - flat(WEIGHTS)
    promised = 1.5 * 0.3 / (0.5 * 50) * np.sqrt(2)  # noise x clip / divisor, over two steps of rate 1
    assert moved.std() == pytest.approx(promised, rel=4 / np.sqrt(2 * len(moved)))


def test_users_change_the_result_by_less_than_their_clip_allows():
    quiet = dataclasses.replace(
        PLAN,
        num_steps=1,
        sample_rate=1.0,
        release=DpSgdRelease(noise_multiplier=1e-9, sample_rate=1.0, num_steps=1, max_users=50),
    )
    with_all = train_generator(WEIGHTS, users(), SPEC, quiet, noise_seed=3, owner="a")
    without_last = train_generator(WEIGHTS, users().select(range(29)), SPEC, quiet, noise_seed=3, owner="a")
    # Dropout and latent draws of the 29 others differ with the batch's shape, so bound the whole sum.
    for trained, count in ((with_all, 30), (without_last, 29)):
        assert np.linalg.norm(flat(trained.weights) - flat(WEIGHTS)) <= 0.3 * count / 50 * (1 + 1e-4)


def test_dropout_and_latents_come_from_the_key_stream(monkeypatch):
    # Torch's CPU generator keeps 32 bits of a seed. Known draws would let one user move the draws of others.
    def known(*args, **kwargs):
        raise AssertionError("torch's generator was asked")

    for name in ("rand", "randn", "rand_like", "randn_like", "normal", "bernoulli", "dropout"):
        monkeypatch.setattr(torch, name, known)
    monkeypatch.setattr(torch.nn.functional, "dropout", known)
    train_generator(WEIGHTS, users(), SPEC, PLAN, noise_seed=None, owner="a")


def test_fedprox_pulls_towards_the_weights_received():
    plain = train_generator(WEIGHTS, users(), SPEC, PLAN, noise_seed=3, owner="a")
    pulled = train_generator(
        WEIGHTS, users(), SPEC, dataclasses.replace(PLAN, proximal_mu=0.9), noise_seed=3, owner="a"
    )
    distances = [np.linalg.norm(flat(result.weights) - flat(WEIGHTS)) for result in (plain, pulled)]
    assert distances[1] < distances[0]


def test_more_users_than_declared_are_refused():
    with pytest.raises(InputError, match="Declare a larger"):
        train_generator(WEIGHTS, users(51), SPEC, PLAN, noise_seed=3, owner="a")


def test_a_plan_out_of_all_proportion_is_refused():
    with pytest.raises(InputError, match="Lower learning_rate"):
        dataclasses.replace(PLAN, learning_rate=1e38)


def test_whether_a_round_is_released_does_not_depend_on_one_user():
    # Weights that overflow for whoever holds item 7: with or without such a user there is a release.
    weights = {name: value.copy() for name, value in WEIGHTS.items()}
    weights["to_logits.weight"][7] = 3e38
    weights["decoder.bias"][:] = 5.0
    holders = Histories.from_rows([[7, 8], *([1, 2, 3] for _ in range(20))], 40)
    for histories in (holders, holders.select(range(1, 21))):
        trained = train_generator(weights, histories, SPEC, PLAN, noise_seed=3, owner="a")
        assert np.isfinite(flat(trained.weights)).all()


def test_a_plan_whose_price_is_of_other_steps_cannot_be_made():
    with pytest.raises(InputError, match="what runs is what is charged"):
        dataclasses.replace(PLAN, num_steps=3)
