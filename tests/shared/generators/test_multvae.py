"""The generator: its loss, its prior, its weights."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.floors import popularity, task_of, train_without_privacy, tstr
from shared.augmentation.synthesis import synthesise_users
from shared.config import load_scenario
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.errors import InputError
from shared.generators.family import initial_weights, model_from
from shared.generators.likelihood import multinomial_log_likelihood
from shared.generators.multvae import MultVAE, VaeSpec, kl_weight_at
from simulations.generator import spec_of
from simulations.owners import build_federation
from tests.shared.dpsgd.stepping import ALL_ENGINES, ENGINES, Case, by_hand, largest_gap, released

PRIORS = VaeSpec.CHOICES["prior"]

SPEC = VaeSpec(
    num_items=30,
    hidden_size=16,
    latent_size=4,
    prior="mixture",
    num_components=3,
    kl_weight=0.5,
    kl_anneal_share=0.5,
    dropout=0.0,
    popularity_scale=5.0,
)


def model(**changes: object) -> MultVAE:
    spec = dataclasses.replace(SPEC, **changes)
    return model_from(spec, initial_weights(spec, 1))


def multi_hot(count: int = 6) -> torch.Tensor:
    return (torch.rand(count, SPEC.num_items, generator=torch.Generator().manual_seed(2)) < 0.3).float()


def users(count: int = 6) -> Bags:
    return Bags.from_dense(multi_hot(count))


class Repeated:
    """Chance that gives a user the same latent in every batch, so that a loop over users can repeat it."""

    def __init__(self, normals: torch.Tensor) -> None:
        self._normals = normals

    def fill_normal(self, values: torch.Tensor, *, stddev: float) -> None:
        values.copy_(self._normals * stddev)


def restless(one: MultVAE, seed: int = 5) -> MultVAE:
    """``one`` in double precision, with every weight moved from where it began, also those that begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.double().parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return one


@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_is_clipped_by_user_as_a_loop_would(prior, engine):
    rows, generator = multi_hot(8), torch.Generator().manual_seed(4)
    normals = torch.randn(8, SPEC.latent_size, generator=generator, dtype=torch.float64)
    scales = 10.0 ** torch.randn(8, generator=generator, dtype=torch.float64)  # from far below the clip to far above

    def losses(module: MultVAE, positions: torch.Tensor) -> torch.Tensor:
        chance = Repeated(normals[positions])
        return scales[positions] * module.loss(Bags.from_dense(rows[positions]), share_done=1.0, chance=chance)

    case = Case(restless(model(prior=prior, kl_weight=2.0)), losses)
    expected, largest = by_hand(case, range(8))
    sums = released(ENGINES[engine], case, range(8))
    assert all(sums[name].any() for name in sums if name.startswith("prior"))
    # Opacus' engines work in single precision in places.
    assert largest_gap(sums, expected) <= (1e-12 if engine == "bookkeeping" else 1e-6) * largest


@pytest.mark.parametrize("latent_size", [4, 5])
def test_the_flow_has_the_density_of_its_draws(latent_size):
    one = restless(model(prior="flow", latent_size=latent_size))
    normal = torch.randn(3, latent_size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    latent = one.prior_flow.from_normal(normal)
    for row in range(3):
        # By definition: the density of the normal, over how much the map stretches space there.
        slopes = torch.autograd.functional.jacobian(lambda x: one.prior_flow.from_normal(x[None])[0], normal[row])
        expected = -0.5 * normal[row].square().sum() - torch.linalg.slogdet(slopes)[1]
        assert float(one.prior_flow.log_density(latent)[row].detach()) == pytest.approx(float(expected), rel=1e-12)
        assert abs(float(torch.linalg.slogdet(slopes)[1])) > 0.05  # or the test would have no teeth


def test_a_flow_begins_as_the_standard_normal():
    flow, gaussian = model(prior="flow"), model(prior="gaussian")
    draws = [one.sample_latent(5, generator=torch.Generator().manual_seed(0)) for one in (flow, gaussian)]
    assert torch.equal(*draws)


def test_a_flow_needs_two_halves():
    with pytest.raises(InputError, match="latent_size must be at least 2"):
        dataclasses.replace(SPEC, prior="flow", latent_size=1)


@pytest.mark.parametrize("prior", PRIORS)
def test_a_users_loss_does_not_depend_on_the_batch(prior):
    # Without dropout the only chance is the latent draw; a fixed posterior mean isolates it.
    one = model(prior=prior)
    with torch.no_grad():
        one.to_log_variance.weight.zero_()
        one.to_log_variance.bias.fill_(-60.0)  # a spread of e^-30: no draw matters
        whole = one.loss(users(), share_done=0.0, chance=Chance.seeded(0))
        alone = [Bags.from_dense(row[None]) for row in multi_hot()]
        parts = [one.loss(user, share_done=0.0, chance=Chance.seeded(9)) for user in alone]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_the_likelihood_is_the_multinomial_one():
    one = model()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()  # every item equally likely, whatever the latent
        loss = one.loss(users(), share_done=0.0, chance=Chance.seeded(0))
    assert torch.allclose(loss, torch.full((6,), float(np.log(SPEC.num_items))))


def test_the_likelihood_and_its_gradient_are_those_of_a_dense_multi_hot():
    logits = torch.randn(6, SPEC.num_items, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 30
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = multinomial_log_likelihood(one, users())
    dense = (torch.log_softmax(other, dim=1) * multi_hot()).sum(1)
    assert torch.allclose(ours, dense, rtol=1e-12)
    slopes = torch.linspace(-2.0, 2.0, 6, dtype=torch.float64)
    (ours * slopes).sum().backward()
    (dense * slopes).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-12)


def test_users_without_items_have_a_loss_and_a_gradient_of_zero():
    one = model()
    nobody = Bags.from_dense(torch.zeros(2, SPEC.num_items))
    losses = one.loss(nobody, share_done=0.0, chance=Chance.seeded(0))
    losses.sum().backward()
    assert not losses.any()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in one.parameters())


def test_the_mixture_divergence_of_one_standard_component_is_the_gaussian_one_on_average():
    mixture, gaussian = model(num_components=1, kl_weight=1.0), model(prior="gaussian", kl_weight=1.0)
    with torch.no_grad():
        mixture.prior_means.values.weight.zero_()
        shared = {name: value for name, value in mixture.state_dict().items() if not name.startswith("prior")}
        gaussian.load_state_dict(shared)
        draws = 4000
        histories = Bags.from_dense(multi_hot(1).expand(draws, -1))
        sampled = [one.loss(histories, share_done=1.0, chance=Chance.seeded(3)) for one in (mixture, gaussian)]
    # The mixture's is a one-draw estimate of the same number; four standard errors.
    error = float((sampled[0] - sampled[1]).std()) / draws**0.5
    assert float((sampled[0] - sampled[1]).mean()) == pytest.approx(0.0, abs=4 * error)


def test_the_prior_is_sampled_as_it_is_described():
    one = model(num_components=2, latent_size=1)
    with torch.no_grad():
        one.prior_means.values.weight.copy_(torch.tensor([[-5.0], [5.0]]))
        one.prior_logits.values.weight.copy_(torch.log(torch.tensor([[0.25], [0.75]])))
        one.prior_log_variances.values.weight.copy_(torch.log(torch.tensor([[0.01], [0.01]])))
    latent = one.sample_latent(4000, generator=torch.Generator().manual_seed(0))[:, 0]
    # 4000 draws know a share of 3/4 to a standard error of 0.7 %.
    assert float((latent > 0).float().mean()) == pytest.approx(0.75, abs=4 * 0.007)
    assert float(latent[latent > 0].std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("prior", PRIORS)
def test_training_learns_which_items_go_together(prior):
    spec = dataclasses.replace(SPEC, prior=prior, kl_weight=0.2)
    one = model_from(spec, initial_weights(spec, 0))
    rng = np.random.default_rng(0)
    data = torch.zeros(400, 30)
    for user in range(400):
        half = 15 * (user % 2)
        data[user, half + rng.choice(15, 6, replace=False)] = 1
    histories = Bags.from_dense(data)
    optimizer, drawing = torch.optim.Adam(one.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    chance = Chance.seeded(0, "training")
    for _ in range(150):
        optimizer.zero_grad()
        one.loss(histories, share_done=1.0, chance=chance).mean().backward()
        optimizer.step()
    with torch.no_grad():
        shares = torch.softmax(one.decode(one.sample_latent(500, generator=drawing)), 1)
    mass = shares[:, :15].sum(1)
    # Users of the prior belong to one half or the other; a generator of popularity alone has .5 everywhere.
    assert float(torch.maximum(mass, 1 - mass).mean()) > 0.8
    assert 0.3 < float((mass > 0.5).float().mean()) < 0.7


@pytest.mark.slow
def test_users_of_the_sample_teach_a_recommender_nearly_what_real_ones_do():
    scenario = load_scenario(None, ["generator.kind=vae", "privacy.epsilon=inf"])
    task = task_of(build_federation(scenario, seed=0), scenario, seed=0)
    spec = spec_of(scenario, task.train.num_items)
    one = model_from(spec, initial_weights(spec, 0))
    train_without_privacy(one, task.train, num_steps=300, expected_batch=256, learning_rate=0.005, seed=0)
    drawn = synthesise_users(one, num_users=10_000, items_per_user=50, max_items_per_user=1000, seed=0)
    l2 = (0.001, 0.003, 0.01)
    real = tstr(task.train, task, l2=l2).metric
    assert tstr(drawn, task, l2=l2).metric >= 0.8 * real
    assert popularity(task) < 0.8 * real  # what a generator of popularity alone would reach


def test_annealing_rises_and_stays():
    weights = [kl_weight_at(SPEC, share_done=share) for share in (0.0, 0.25, 0.5, 0.9)]
    assert weights == [0.0, 0.25, 0.5, 0.5]
    assert kl_weight_at(dataclasses.replace(SPEC, kl_anneal_share=0.0), share_done=0.0) == 0.5


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = initial_weights(SPEC, 1), initial_weights(SPEC, 1), initial_weights(SPEC, 2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    assert {value.dtype for value in first.values()} == {np.dtype(np.float32)}


def test_weights_that_do_not_fit_are_refused():
    weights = initial_weights(SPEC, 1)
    with pytest.raises(InputError, match="first difference at encoder"):
        model_from(SPEC, {**weights, "encoder.bias": np.zeros(3, dtype=np.float32)})
    with pytest.raises(InputError, match="not finite"):
        model_from(SPEC, {**weights, "encoder.bias": np.full(16, np.nan, dtype=np.float32)})
    with pytest.raises(InputError, match="unexpected keyword"):
        VaeSpec.from_dict({**SPEC.to_dict(), "depth": 3})
