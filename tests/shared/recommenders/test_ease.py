import numpy as np
import pytest

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.ease import Ease
from tests.shared.recommenders.planted import planted_users


def slow_scores(real, synthetic, weight, share, fold_in):
    """Steck 2019, equation 8, in double precision."""
    rows, known = real.to_csr().toarray().astype(float), fold_in.to_csr().toarray().astype(float)
    gram = rows.T @ rows + share * rows.sum() * np.eye(real.num_items)
    if weight:
        others = synthetic.to_csr().toarray().astype(float)
        gram += weight * rows.sum() / others.sum() * others.T @ others
    precision = np.linalg.inv(gram)
    coefficients = -precision / np.diag(precision)
    np.fill_diagonal(coefficients, 0)
    return known @ coefficients


@pytest.mark.parametrize("num_users", [20, 31, 200], ids=["woodbury", "just over half", "direct"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("share", [1e-4, 1e-2])
def test_scores_equal_dense_ease(num_users, weight, share):
    rng = np.random.default_rng(0)
    real, synthetic, fold_in = (planted_users(n, rng=rng) for n in (num_users, 500, 25))
    fitted = Ease((share,)).fit(real, synthetic, weight=weight, seed=0)
    expected = slow_scores(real, synthetic, weight, share, fold_in)
    np.testing.assert_allclose(fitted.scores(fold_in), expected, atol=1e-4)


def test_single_precision_is_enough_where_the_system_is_hard():
    # Head items in nearly every history and a tiny penalty: the condition number is about 1e5.
    rng = np.random.default_rng(1)
    rows = [np.concatenate([np.arange(5), 5 + rng.choice(295, 10, replace=False)]) for _ in range(3000)]
    synthetic = Histories.from_rows(rows, 300)
    real, fold_in = synthetic.select(np.arange(100)), synthetic.select(np.arange(200, 230))
    fitted = Ease((1e-3,)).fit(real, synthetic, weight=3.0, seed=0)
    expected = slow_scores(real, synthetic, 3.0, 1e-3, fold_in)
    assert np.abs(fitted.scores(fold_in) - expected).max() < 1e-3 * np.abs(expected).max()


def test_owners_share_what_depends_on_synthetic_users_alone():
    rng = np.random.default_rng(0)
    synthetic = planted_users(500, rng=rng)
    recommender = Ease((0.01,))
    for _ in range(5):
        recommender.fit(planted_users(20, rng=rng).keep(rng.random(160) < 0.7), synthetic, weight=0.3, seed=0)
    assert len(recommender._inverses._inverses) == 1


@pytest.mark.parametrize("max_bytes", [1, 3 * 60 * 60 * 4, 2**30], ids=["none fits", "three fit", "all fit"])
def test_what_is_remembered_changes_nothing(monkeypatch, max_bytes):
    monkeypatch.setattr("shared.recommenders.ease._CACHE_BYTES", max_bytes)
    rng = np.random.default_rng(0)
    real, fold_in = planted_users(20, rng=rng), planted_users(5, rng=rng)
    sets = [planted_users(100, rng=rng) for _ in range(3)]
    small = Ease((0.01,))
    for synthetic in [*sets, *sets]:
        for weight in (0.1, 1.0):
            fitted = small.fit(real, synthetic, weight=weight, seed=0)
            alone = Ease((0.01,)).fit(real, synthetic, weight=weight, seed=0)
            np.testing.assert_array_equal(fitted.scores(fold_in), alone.scores(fold_in))
            assert sum(inverse.nbytes for inverse in small._inverses._inverses.values()) <= max_bytes
            assert len(small._inverses._grams) <= 2


def test_an_owner_without_interactions_is_told_what_to_do():
    empty = Histories.from_rows([[], []], 10)
    with pytest.raises(InputError, match=r"lower data\.min_interactions"):
        Ease((0.01,)).fit(empty, seed=0)


@pytest.mark.parametrize("num_users", [25, 400], ids=["woodbury", "direct"])
def test_a_penalty_below_precision_is_refused(num_users):
    same = Histories.from_rows([np.arange(30)] * num_users, 60)
    with pytest.raises(InputError, match=r"Raise recommender\.l2"):
        Ease((1e-12,)).fit(same, seed=0)
