"""Generators that begin from a released statistic know something before they are trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.config import load_scenario
from shared.data.histories import Histories
from shared.data.splits import Split
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.base import Weights
from shared.generators.family import initial_weights, model_from
from shared.generators.multvae import MultVAE, VaeSpec
from shared.generators.spectral import SpectralSpec
from shared.generators.warm_start import warm_start_popularity, warm_start_vae
from simulations.owners import build_federation
from tests.shared.generators.test_spectral import NUM_ITEMS, sketch_of, together
from tests.shared.recommenders.planted import planted_split

SPEC = VaeSpec(
    num_items=NUM_ITEMS,
    hidden_size=16,
    latent_size=8,
    prior="mixture",
    num_components=3,
    kl_weight=0.2,
    kl_anneal_share=0.5,
    dropout=0.0,
    popularity_scale=5.0,
)
SPLIT = planted_split(900, rng=np.random.default_rng(5))
SKETCH = sketch_of(SPLIT.train)


def logits_of(model: MultVAE, fold_in: Histories) -> torch.Tensor:
    """What the model says after having seen ``fold_in``, at the mean of the posterior."""
    seen = Bags.from_rows(fold_in.to_csr(), np.arange(fold_in.num_users))
    inputs = seen.lengths.float().rsqrt()[seen.users]
    with torch.no_grad():
        hidden = torch.tanh(model.encoder(seen.items, inputs, seen.starts))
        return model.decode(model.to_mean(hidden))


def held_out_likelihood(logits: torch.Tensor, split: Split) -> float:
    """Mean log-likelihood of a target among all items not in the fold-in."""
    seen, targets = (torch.from_numpy(part.to_csr().toarray()) for part in (split.fold_in, split.targets))
    shares = torch.log_softmax(logits.masked_fill(seen > 0, -torch.inf), dim=1)
    return float(shares[targets > 0].mean())


def of_popularity(split: Split) -> float:
    counts = np.maximum(np.bincount(split.train.items, minlength=split.train.num_items), 0.5)
    logits = torch.from_numpy(np.log(counts)).float().expand(split.fold_in.num_users, -1)
    return held_out_likelihood(logits, split)


def of_weights(weights: Weights, spec: VaeSpec, split: Split) -> float:
    return held_out_likelihood(logits_of(model_from(spec, weights), split.fold_in), split)


@pytest.mark.parametrize("prior", ["gaussian", "mixture", "flow"])
@pytest.mark.parametrize("sizes", [(16, 8), (8, 16)])
def test_a_warm_vae_knows_users_before_it_is_trained(prior, sizes):
    spec = replace(SPEC, prior=prior, hidden_size=sizes[0], latent_size=sizes[1])
    warm, cold = warm_start_vae(SKETCH, spec, seed=0), initial_weights(spec, 0)
    assert {n: v.shape for n, v in warm.items()} == {n: v.shape for n, v in cold.items()}
    assert {value.dtype for value in warm.values()} == {np.dtype(np.float32)}
    # The planted groups leave 50 of the 60 items a tenth of the mass: who sees the group gains more than one nat.
    assert of_weights(warm, spec, SPLIT) > max(of_weights(cold, spec, SPLIT), of_popularity(SPLIT)) + 1.0


def test_a_warm_vae_draws_users_whose_items_go_together():
    drawn = model_from(SPEC, warm_start_vae(SKETCH, SPEC, seed=0)).draw(
        np.full(3000, 8, dtype=np.int64), generator=torch.Generator().manual_seed(0)
    )
    beside = ~np.eye(NUM_ITEMS, dtype=bool)
    # Not as near as the spectral generator: tanh bends the large latents that six separate groups need.
    assert np.corrcoef(together(drawn)[beside], together(SPLIT.train)[beside])[0, 1] > 0.7


def test_every_layer_of_a_warm_vae_gets_a_gradient():
    model = model_from(SPEC, warm_start_vae(SKETCH, SPEC, seed=0))
    users = Bags.from_rows(SPLIT.train.to_csr(), np.arange(50))
    model.loss(users, share_done=1.0, chance=Chance.seeded(0)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_the_prior_of_a_warm_vae_is_about_standard_normal():
    spec = replace(SPEC, num_components=400)
    model = model_from(spec, warm_start_vae(SKETCH, spec, seed=0))
    latent = model.sample_latent(4000, generator=torch.Generator().manual_seed(0))
    # Half of the variance comes from 400 means, known to 1 / √200 each way: four of those halves over 8 dimensions.
    assert float(latent.var()) == pytest.approx(1.0, abs=4 * 0.5 / 200**0.5)


@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_popularity_alone_is_put_where_the_scale_finds_it(scale):
    spec = replace(SPEC, popularity_scale=scale)
    weights = warm_start_popularity(SKETCH, spec, seed=0)
    bias = scale * weights["to_logits.bias"]
    assert bias - bias.mean() == pytest.approx(np.log(SKETCH.popularity) - np.log(SKETCH.popularity).mean(), abs=1e-5)
    cold = initial_weights(spec, 0)
    assert all(np.array_equal(weights[name], cold[name]) for name in cold if name != "to_logits.bias")


def test_a_scale_of_zero_starts_without_popularity():
    assert not warm_start_popularity(SKETCH, replace(SPEC, popularity_scale=0.0), seed=0)["to_logits.bias"].any()


def test_what_cannot_be_started_is_refused():
    with pytest.raises(InputError, match="60 items, the generator of 61"):
        warm_start_vae(SKETCH, replace(SPEC, num_items=61), seed=0)
    with pytest.raises(InputError, match="no bias of items"):
        warm_start_popularity(SKETCH, SpectralSpec(num_items=NUM_ITEMS, latent_size=4), seed=0)


@pytest.mark.slow
def test_on_the_sample_a_warm_vae_beats_popularity_and_a_cold_one():
    owners = build_federation(load_scenario(None, []), seed=0).owners
    parts = ([getattr(o.split, name) for o in owners] for name in ("train", "fold_in", "targets"))
    split = Split(*(Histories.concatenate(part) for part in parts))
    spec = replace(SPEC, num_items=split.train.num_items, hidden_size=100, latent_size=32)
    warm = of_weights(warm_start_vae(sketch_of(split.train, head_items=2000), spec, seed=0), spec, split)
    assert warm > of_popularity(split) + 0.1
    assert warm > of_weights(initial_weights(spec, 0), spec, split) + 0.3
