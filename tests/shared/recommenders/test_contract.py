"""What every recommender promises, checked on each of them."""

import copy

import numpy as np
import pytest
import torch

from shared.config import RecommenderSection
from shared.data.histories import Histories
from shared.devices import choose_device
from shared.errors import InputError
from shared.metrics.ranking import rank
from shared.recommenders.base import build_recommender
from tests.shared.recommenders.planted import planted_split, planted_users

NUM_ITEMS = 60


EPOCHS = {"ease": 1, "multvae": 40, "sasrec": 12}


@pytest.fixture(scope="module", params=EPOCHS)
def recommender(request):
    section = RecommenderSection(
        kind=request.param, l2=(0.003,), epochs=EPOCHS[request.param], hidden_size=32, learning_rate=5e-3, device="cpu"
    )
    return build_recommender(section, NUM_ITEMS)


@pytest.fixture(scope="module")
def split():
    return planted_split(100, rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def fitted(recommender, split):
    return recommender.fit(split.train, seed=0)


def contents(histories):
    return copy.deepcopy((histories.indptr, histories.items))


def test_same_seed_same_scores_for_unseen_users_over_the_whole_catalogue(recommender, fitted, split):
    first = fitted.scores(split.fold_in)
    again = recommender.fit(split.train, seed=0).scores(split.fold_in)
    assert first.shape == (split.fold_in.num_users, NUM_ITEMS)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


def test_a_user_is_scored_alike_alone_and_in_company(fitted, split):
    together = fitted.scores(split.fold_in)
    alone = fitted.scores(split.fold_in.select([4]))
    np.testing.assert_allclose(alone[0], together[4], atol=1e-4)


def test_a_user_without_history_gets_finite_scores(fitted):
    scores = fitted.scores(Histories.from_rows([[], [1, 2]], NUM_ITEMS))
    assert np.isfinite(scores).all()


def test_inputs_and_global_chance_are_untouched(recommender, split):
    synthetic = planted_users(80, rng=np.random.default_rng(1))
    before = [contents(part) for part in (split.train, synthetic, split.fold_in)]
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    recommender.fit(split.train, synthetic, weight=0.5, seed=0).scores(split.fold_in)
    for part, (indptr, items) in zip((split.train, synthetic, split.fold_in), before, strict=True):
        np.testing.assert_array_equal(part.indptr, indptr)
        np.testing.assert_array_equal(part.items, items)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_weight_zero_is_no_synthetic_at_all(recommender, fitted, split):
    synthetic = planted_users(80, rng=np.random.default_rng(1))
    without = fitted.scores(split.fold_in)
    at_zero = recommender.fit(split.train, synthetic, weight=0.0, seed=0).scores(split.fold_in)
    np.testing.assert_array_equal(without, at_zero)


def test_learns_the_structure_that_was_planted(fitted, split):
    random = 10 / (NUM_ITEMS - 4)  # share of the not yet known items that a list of ten shows
    learnt = rank(fitted, split.fold_in, split.targets, k=10).recall.mean()
    assert learnt > 2.5 * random


def test_synthetic_users_teach_what_real_users_do_not_show(recommender, split):
    rng = np.random.default_rng(2)
    few = planted_users(30, loyalty=1 / 6, rng=rng)  # no structure at all
    useful = planted_users(150, rng=rng)
    alone = rank(recommender.fit(few, seed=0), split.fold_in, split.targets, k=10).recall.mean()
    helped = rank(recommender.fit(few, useful, weight=5.0, seed=0), split.fold_in, split.targets, k=10).recall.mean()
    assert helped > alone + 0.1


@pytest.mark.parametrize("kind", EPOCHS)
def test_variants_trained_together_are_those_trained_one_by_one(kind, split):
    section = RecommenderSection(kind=kind, l2=(0.003, 0.03), epochs=4, hidden_size=8, learning_rate=5e-3, device="cpu")
    recommender = build_recommender(section, NUM_ITEMS)
    how = {"weight": 0.5, "schedule": recommender.schedules[-1], "seed": 3}
    real, synthetic = split.train.select(np.arange(40)), planted_users(30, rng=np.random.default_rng(1))
    together = [fitted.scores(split.fold_in) for fitted in recommender.fit_variants(real, synthetic, **how)]
    assert len(together) == len(recommender.variants())
    for variant, scores in zip(recommender.variants(), together, strict=True):
        np.testing.assert_array_equal(variant.fit(real, synthetic, **how).scores(split.fold_in), scores)
    assert not np.array_equal(together[0], together[-1])
    if kind != "ease":  # untuned, it is trained to the end
        np.testing.assert_array_equal(recommender.fit(real, synthetic, **how).scores(split.fold_in), together[-1])


def test_fading_synthetic_users_leave_the_last_word_to_real_ones(recommender, split):
    if "fade" not in recommender.schedules:
        with pytest.raises(InputError, match="Use constant, or"):
            recommender.fit(split.train, split.train, weight=1.0, schedule="fade", seed=0)
        return
    # Synthetic users whose items go together as no real user's do.
    wrong = planted_users(150, rng=np.random.default_rng(2))
    wrong = Histories(wrong.indptr, np.random.default_rng(3).permutation(NUM_ITEMS).astype(np.int32)[wrong.items], 60)
    recall = {}
    for schedule in recommender.schedules:
        fitted = recommender.fit(split.train, wrong, weight=1.0, schedule=schedule, seed=0)
        recall[schedule] = rank(fitted, split.fold_in, split.targets, k=10).recall.mean()
    assert recall["fade"] > recall["constant"] + 0.1


def test_a_weight_without_synthetic_users_is_refused(recommender, split):
    with pytest.raises(InputError, match="Synthesise some or use 0"):
        recommender.fit(split.train, weight=0.1, seed=0)
    with pytest.raises(InputError, match="must be 0 or more"):
        recommender.fit(split.train, split.train, weight=-0.1, seed=0)


def test_synthetic_users_of_another_catalogue_are_refused(recommender, split):
    with pytest.raises(InputError, match="a generator of this catalogue"):
        recommender.fit(split.train, planted_users(5, num_items=90, rng=np.random.default_rng(0)), weight=1, seed=0)


def test_a_device_that_is_named_must_exist():
    assert choose_device("cpu", key="recommender.device").type == "cpu"
    assert choose_device("auto", key="recommender.device").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="auto, cpu, cuda or cuda:N"):
        choose_device("gpu", key="recommender.device")
    with pytest.raises(InputError, match=r"recommender\.device=auto or cpu"):
        choose_device("cuda:99", key="recommender.device")
    with pytest.raises(InputError, match=r"recommender\.device=auto or cpu"):
        choose_device("meta", key="recommender.device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["multvae", "sasrec"])
def test_learns_on_cuda_too(kind, split):
    section = RecommenderSection(kind=kind, epochs=EPOCHS[kind], hidden_size=32, learning_rate=5e-3, device="cuda")
    how = {"weight": 0.5, "schedule": "fade", "seed": 0}
    *_, trained = build_recommender(section, NUM_ITEMS).fit_variants(split.train, split.train, **how)
    learnt = rank(trained, split.fold_in, split.targets, k=10).recall.mean()
    assert learnt > 2.5 * 10 / (NUM_ITEMS - 4)
