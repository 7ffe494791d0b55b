"""The generator that is read off a statistic: it has the released moments, and items that go together."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.errors import FedAugError, InputError
from shared.generators import spectral
from shared.generators.base import Weights, load_weights
from shared.generators.spectral import Spectral, SpectralSpec, fit_spectral, item_vectors
from shared.metrics.ranking import rank
from shared.privacy.releases import GaussianRelease
from shared.recommenders.ease import Ease
from shared.sketch.release import Sketch, choose_head, read_sketch
from shared.sketch.statistic import compute_sketch, plan_sketches
from tests.shared.recommenders.planted import planted_split, planted_users

NUM_ITEMS = 60
SPEC = SpectralSpec(num_items=NUM_ITEMS, latent_size=8)
USERS = planted_users(900, rng=np.random.default_rng(0))


def sketch_of(users: Histories, *, head_items: int = NUM_ITEMS, noise: float | None = None) -> Sketch:
    plans = plan_sketches(users.num_items, head_items=head_items)
    if noise is not None:
        plans = tuple(
            replace(t, release=GaussianRelease(statistic=t.statistic, noise_multiplier=noise, max_users=10_000))
            for t in plans
        )
    sums: list[dict[str, np.ndarray]] = []
    for terms in plans:
        head = choose_head(sums[0]["popularity"], head_items) if sums else None
        arrays = compute_sketch(users, terms, head=head, chance=Chance.seeded(0, terms.statistic))
        sums.append({name: values.astype(np.float64) for name, values in arrays.items()})
    return read_sketch(sums, plans, num_owners=1, num_items=users.num_items)


def without_pairs(sketch: Sketch) -> Sketch:
    return replace(sketch, values=np.empty(0), vectors=np.empty((NUM_ITEMS, 0), dtype=np.float32))


def model_of(weights: Weights, spec: SpectralSpec = SPEC) -> Spectral:
    one = Spectral(spec)
    load_weights(one, weights)
    return one


def drawn(weights: Weights, count: int = 6000, length: int = 8, spec: SpectralSpec = SPEC) -> Histories:
    lengths = np.full(count, length, dtype=np.int64)
    return model_of(weights, spec).draw(lengths, generator=torch.Generator().manual_seed(3))


def together(users: Histories) -> np.ndarray:
    rows = users.to_csr().toarray().astype(np.float64)
    rows /= np.sqrt(rows.sum(1, keepdims=True))
    square = rows.T @ rows / users.num_users
    np.fill_diagonal(square, 0.0)
    return square


def shares(users: Histories) -> np.ndarray:
    return np.bincount(users.items, minlength=users.num_items) / users.num_interactions


@pytest.fixture(scope="module")
def sketch() -> Sketch:
    return sketch_of(USERS)


@pytest.fixture(scope="module")
def weights(sketch) -> Weights:
    return fit_spectral(sketch, SPEC, seed=0)


def test_users_have_the_released_popularity(weights):
    # A user has an item with a chance of 0.13, so 6,000 users know its share to a relative 3.3 %. The fit saw 4,096
    # latents and knows no better: 4.8 % together, and four of those.
    assert shares(drawn(weights)) == pytest.approx(shares(USERS), rel=0.19)


def test_users_have_the_released_cooccurrence(sketch, weights):
    truth, independent = together(USERS), fit_spectral(without_pairs(sketch), SPEC, seed=0)
    error, baseline = (float(np.linalg.norm(together(drawn(w)) - truth)) for w in (weights, independent))
    # Groups are not normal, and so are met only nearly; a start without the fit leaves 0.69 of the difference.
    assert error < 0.35 * baseline


def test_the_fit_brings_the_moments_nearer(sketch, weights, monkeypatch):
    monkeypatch.setattr(spectral, "_STEPS", 0)
    start = fit_spectral(sketch, SPEC, seed=0)
    before, after = (float(np.linalg.norm(together(drawn(w)) - together(USERS))) for w in (start, weights))
    assert after < 0.8 * before


def test_a_recommender_of_drawn_users_alone_serves_real_ones(sketch, weights):
    split = planted_split(900, rng=np.random.default_rng(5))
    score = [
        float(rank(Ease((0.01,)).fit(users, seed=0), split.fold_in, split.targets).ndcg.mean())
        for users in (split.train, drawn(weights))
    ]
    assert score[1] > 0.9 * score[0]


def test_chances_of_draws_without_replacement_are_those_that_are_drawn(sketch):
    # One latent for all users, so that what is drawn has one chance for each item.
    vectors = np.zeros((NUM_ITEMS, 1), dtype=np.float32)
    bias = np.random.default_rng(0).normal(0.0, 1.5, NUM_ITEMS)
    fit = spectral._Fit(sketch, vectors, bias, 0)
    expected = fit._chances(torch.zeros(1, 1), torch.full((1, 1), 12.0))[0][0].numpy()
    assert expected.sum() == pytest.approx(12.0, rel=1e-3)
    one = {"to_logits.weight": vectors, "to_logits.bias": bias.astype(np.float32)}
    users = drawn(one, count=4000, length=12, spec=SpectralSpec(num_items=NUM_ITEMS, latent_size=1))
    seen = np.bincount(users.items, minlength=NUM_ITEMS) / 4000
    # A chance is known to 0.8 % from 4,000 users; the formula is good to about 2 % (Rosén's is asymptotic).
    assert seen == pytest.approx(expected, abs=4 * 0.008)


def test_the_gradient_is_that_of_the_squared_difference(sketch):
    # Two batches of latents, differentiated by torch through the definition, with dense matrices.
    rng = torch.Generator().manual_seed(0)
    vectors = (0.3 * torch.randn(NUM_ITEMS, 4, generator=rng)).numpy()
    fit = spectral._Fit(sketch, vectors, np.log(sketch.popularity), 0)
    half = spectral._LATENTS
    chances = torch.rand(2 * half, NUM_ITEMS, generator=rng).requires_grad_()
    scale = torch.rand(2 * half, 1, generator=rng) / half
    one, two = ((s * c).T @ c for s, c in zip(scale.split(half), chances.split(half), strict=True))
    target = (fit._factor * fit._strength) @ fit._factor.T
    beside = 1.0 - torch.eye(NUM_ITEMS)
    (beside * (one - target) * (two - target)).sum().backward()
    assert chances.grad is not None
    found = fit._towards(chances.detach(), scale)
    assert torch.allclose(found, chances.grad, atol=1e-4 * float(chances.grad.abs().max()))


def test_items_outside_the_head_have_their_popularity_and_nothing_else():
    narrow = fit_spectral(sketch_of(USERS, head_items=40), SPEC, seed=0)
    outside = ~narrow["to_logits.weight"].any(axis=1)
    assert outside.sum() == 20
    made, real = shares(drawn(narrow)), shares(USERS)
    # Their chance is taken as linear in their mass: at 0.12, far more than a tail has, that is 9 % too little.
    assert made[outside].sum() == pytest.approx(real[outside].sum(), rel=0.13)
    inside = np.ix_(~outside, ~outside)
    assert np.corrcoef(together(drawn(narrow))[inside].ravel(), together(USERS)[inside].ravel())[0, 1] > 0.9


def test_where_no_pair_stands_out_popularity_is_drawn(sketch):
    steep = np.exp(-np.arange(NUM_ITEMS) / 15.0)
    weights = fit_spectral(replace(without_pairs(sketch), popularity=steep / steep.sum()), SPEC, seed=0)
    assert not weights["to_logits.weight"].any()
    made = shares(drawn(weights, count=20_000))
    # A share of 0.005 of 160,000 draws is known to a relative 3.5 %, and is wrong by 4 % from lengths in buckets.
    wanted = steep / steep.sum()
    assert made == pytest.approx(wanted, rel=0.18)
    # Softmax alone would not do: the most popular item is in half of the histories, and in none of them twice.
    softmax = {**weights, "to_logits.bias": np.log(wanted).astype(np.float32)}
    assert abs(made[0] / wanted[0] - 1) < 0.06
    assert shares(drawn(softmax, count=20_000))[0] < 0.9 * wanted[0]


def test_noise_does_not_make_items_look_alike_that_are_not():
    sketch = sketch_of(USERS, noise=1.0)
    vectors = item_vectors(sketch, 8)
    alike = vectors @ vectors.T
    same = (np.arange(NUM_ITEMS)[:, None] - np.arange(NUM_ITEMS)) % 6 == 0
    np.fill_diagonal(same, False)
    assert alike[same].mean() > 5 * np.abs(alike[~same & ~np.eye(NUM_ITEMS, dtype=bool)].mean())


def test_the_same_seed_gives_the_same_weights(sketch, weights):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first, again, other = (fit_spectral(sketch, SPEC, seed=seed) for seed in (1, 1, 2))
    torch.set_num_threads(threads)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}


def test_more_dimensions_than_items_are_left_empty(sketch):
    wide = SpectralSpec(num_items=NUM_ITEMS, latent_size=80)
    made = fit_spectral(sketch, wide, seed=0)
    assert made["to_logits.weight"].shape == (NUM_ITEMS, 80)
    assert np.isfinite(made["to_logits.weight"]).all()


def test_a_head_of_one_item_has_no_pairs():
    made = fit_spectral(sketch_of(USERS, head_items=1), SPEC, seed=0)
    assert not made["to_logits.weight"].any()
    assert np.isfinite(made["to_logits.bias"]).all()


def test_it_is_never_trained_on_users():
    one = Spectral(SPEC)
    with pytest.raises(FedAugError, match="never trained on users"):
        one.encode(USERS)
    with pytest.raises(FedAugError, match=r"generator\.warm_start"):
        one.loss(None, share_done=0.0, chance=Chance.seeded(0))


def test_a_sketch_of_another_catalogue_is_refused(sketch):
    with pytest.raises(InputError, match="60 items, the generator of 61"):
        fit_spectral(sketch, replace(SPEC, num_items=61), seed=0)
