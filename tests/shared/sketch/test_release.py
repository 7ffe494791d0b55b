"""What is read off noised sums: shares, the head, and the directions that stand out of the noise."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.privacy.releases import GaussianRelease
from shared.sketch import eigenpairs, release
from shared.sketch.release import Sketch, choose_head, read_sketch, save_sketch
from shared.sketch.statistic import compute_sketch, plan_sketches
from tests.shared.recommenders.planted import planted_users

USERS = planted_users(900, rng=np.random.default_rng(0))


def sketch_of(*, head_items: int = 60, noise: float | None = None, num_owners: int = 1, seed: int = 0) -> Sketch:
    plans = plan_sketches(USERS.num_items, head_items=head_items)
    if noise is not None:
        priced = [GaussianRelease(statistic=t.statistic, noise_multiplier=noise, max_users=900) for t in plans]
        plans = tuple(replace(t, release=price) for t, price in zip(plans, priced, strict=True))
    owners = [USERS.select(np.arange(900) % num_owners == owner) for owner in range(num_owners)]
    sums: list[dict[str, np.ndarray]] = []
    for terms in plans:
        head = choose_head(sums[0]["popularity"], head_items) if sums else None
        replies = [
            compute_sketch(users, terms, head=head, chance=Chance.seeded(seed, terms.statistic, owner))
            for owner, users in enumerate(owners)
        ]
        sums.append(
            {name: np.sum([reply[name].astype(np.float64) for reply in replies], axis=0) for name in replies[0]}
        )
    return read_sketch(sums, plans, num_owners=num_owners, num_items=USERS.num_items)


def together() -> np.ndarray:
    rows = USERS.to_csr().toarray()
    rows /= np.sqrt(rows.sum(1, keepdims=True))
    return rows.T @ rows


def test_without_noise_everything_is_exact():
    sketch = sketch_of()
    rows = USERS.to_csr().toarray()
    by_root = (rows / np.sqrt(rows.sum(1, keepdims=True))).sum(0)
    assert sketch.popularity == pytest.approx(by_root / by_root.sum(), rel=1e-5)
    assert sketch.num_users == pytest.approx(900, rel=1e-5)
    # Everyone has 8 items.
    assert sketch.length_shares[sketch.length_edges.index(8)] == pytest.approx(1.0, abs=1e-6)
    assert sketch.noise_stddev == 0.0
    assert (sketch.vectors * sketch.values) @ sketch.vectors.T == pytest.approx(together(), abs=1e-3)


def test_owners_add_up():
    one, three = sketch_of(), sketch_of(num_owners=3)
    assert three.popularity == pytest.approx(one.popularity, rel=1e-5)
    assert three.values == pytest.approx(one.values, rel=1e-4)
    assert sketch_of(num_owners=4, noise=1.0).noise_stddev == pytest.approx(2.0 * sketch_of(noise=1.0).noise_stddev)


@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_what_stands_out_of_noise_is_nearer_to_the_truth_than_what_was_released(noise):
    sketch = sketch_of(noise=noise)
    assert 1 <= sketch.rank < 20
    estimate = (sketch.vectors * sketch.values) @ sketch.vectors.T
    shrunk = float(np.linalg.norm(estimate - together()))
    assert shrunk < np.linalg.norm(together())
    # The release's own error: stddev / √2 on each of 60² numbers, more on the diagonal.
    assert shrunk < 0.8 * sketch.noise_stddev / np.sqrt(2.0) * 60


def test_pure_noise_leaves_nothing():
    nothing = [
        release._denoised(release._square(np.random.default_rng(seed).normal(size=100 * 101 // 2), 100), noise=0.5**0.5)
        for seed in range(50)
    ]
    # At most one in 200 exceeds the margin; two or more of 50 would have a chance of 3 %, three of 0.2 %.
    assert sum(len(values) > 0 for _, values in nothing) <= 2


def test_shrinkage_is_that_of_a_spike_in_noise():
    # A spike of strength θ in noise: the eigenvalue rises to θ + M τ² / θ, what is kept of it is θ (1 - M τ² / θ²).
    size, noise, strength = 500, 1.0, 80.0
    rng = np.random.default_rng(1)
    vector = rng.normal(size=size)
    vector /= np.linalg.norm(vector)
    draws = rng.normal(size=(size, size))
    square = (strength * np.outer(vector, vector) + (draws + draws.T) / np.sqrt(2.0) * noise).astype(np.float32)
    vectors, values = release._denoised(square, noise=noise)
    assert len(values) == 1
    # An eigenvalue above the edge moves by about √2 τ, its cosine by about 1 / √M; four and two of those.
    assert values[0] == pytest.approx(strength * (1 - size * noise**2 / strength**2), abs=4 * 2**0.5)
    assert float((vectors[:, 0] @ vector) ** 2) == pytest.approx(1 - size * noise**2 / strength**2, abs=2 / size**0.5)


def test_a_large_head_is_read_by_the_same_rule(monkeypatch):
    dense = sketch_of(noise=2.0)
    monkeypatch.setattr(eigenpairs, "_DENSE_UP_TO", 10)
    iterated = sketch_of(noise=2.0)
    assert iterated.values == pytest.approx(dense.values, rel=1e-3)
    assert np.abs(iterated.vectors - dense.vectors).max() < 0.01


def test_where_nothing_survives_popularity_does():
    sketch = sketch_of(noise=500.0)
    assert sketch.rank == 0
    assert sketch.popularity.sum() == pytest.approx(1.0)
    assert (sketch.popularity > 0).all()
    assert sketch.length_shares.sum() == pytest.approx(1.0)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_shares_are_a_distribution_whatever_the_noise(values):
    shares = release._to_shares(np.array(values))
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(1.0)


def test_shares_of_rare_items_do_not_add_up_noise():
    # 100 items of 100 users each among 10,000 that nobody has: cut at 0, the noise of the rest would add up to 0.4 ×
    # 10,000 × 10 = 40,000, four times as much as there is.
    values = np.concatenate([np.full(100, 100.0), np.zeros(10_000)])
    noisy = values + np.random.default_rng(0).normal(0.0, 10.0, len(values))
    assert release._to_shares(noisy)[:100].sum() > 0.5
    assert np.maximum(noisy, 0)[:100].sum() / np.maximum(noisy, 0).sum() < 0.25


def test_the_head_is_the_most_popular_in_rising_order():
    assert choose_head(np.array([3.0, 9.0, 3.0, 7.0, -1.0]), 3).tolist() == [0, 1, 3]


def test_a_head_narrower_than_the_catalogue_is_found_by_popularity():
    sketch = sketch_of(head_items=20)
    assert sketch.head.tolist() == choose_head(sketch.popularity, 20).tolist()
    assert sketch.vectors.shape == (20, sketch.rank)
    assert len(sketch.popularity) == 60


def test_sums_that_are_not_what_was_asked_are_refused():
    plans = plan_sketches(60, head_items=60)
    sums = {
        name: values.astype(np.float64)
        for name, values in compute_sketch(USERS, plans[0], head=None, chance=Chance.seeded(0)).items()
    }
    bad = [
        {**sums, "popularity": sums["popularity"][:-1]},
        {**sums, "lengths": np.full_like(sums["lengths"], np.nan)},
        {"popularity": sums["popularity"]},
    ]
    for wrong in bad:
        with pytest.raises(InputError, match="missing, is not of shape"):
            read_sketch([wrong], plans, num_owners=1, num_items=60)
    with pytest.raises(InputError, match="the first must tell popularity"):
        read_sketch([], [], num_owners=1, num_items=60)


def test_what_is_saved_is_what_was_read(tmp_path):
    sketch = sketch_of(noise=2.0)
    save_sketch(tmp_path / "sketch.safetensors", sketch)
    arrays = safetensors.numpy.load_file(tmp_path / "sketch.safetensors")
    assert set(arrays) == set(Sketch.__dataclass_fields__)
    assert np.array_equal(arrays["vectors"], sketch.vectors)
    assert np.array_equal(arrays["popularity"], sketch.popularity)
