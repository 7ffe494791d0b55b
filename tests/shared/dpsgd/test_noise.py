"""The noise of what leaves the optimizer: as much as promised, white, everywhere and in every step."""

from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from shared.dpsgd import chance as chance_module
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES
from shared.dpsgd.layers import ScaledBiasLinear, SparseBag
from tests.shared.dpsgd.normality import correlations, kolmogorov, moments, tail
from tests.shared.dpsgd.stepping import ALL_ENGINES, Case, by_hand, difference, largest_gap, norm, release_of, steps

ENGINE = pytest.mark.parametrize("engine", ALL_ENGINES)
CHUNK = chance_module._CHUNK
MAX_GRAD_NORM, NOISE_MULTIPLIER = 0.5, 3.0
STDDEV = MAX_GRAD_NORM * NOISE_MULTIPLIER
# Standard errors that none of the checks below exceeds but once in 100,000 runs of other seeds; these seeds are fixed.
LIMIT = 5.5


class Wide(nn.Module):
    """Layers of several kinds, of which the losses use the first two; the large one takes several chunks of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.bag = SparseBag(300, 2)
        self.unused = nn.ModuleDict(
            {
                "large": nn.Linear(1100, 400),
                "norm": nn.LayerNorm(500),
                "rows": nn.Embedding(200, 30),
                "scaled": ScaledBiasLinear(100, 100, bias_scale=10.0),
            }
        )


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def losses(module: Wide, users: torch.Tensor) -> torch.Tensor:
    bags = module.bag(users, torch.ones(len(users)), torch.arange(len(users)))
    return (module.used(ROWS[users]) + bags).sum(1)


CASE = Case(Wide(), losses)
BATCHES = [[0, 1, 2, 3], [], [0]]


@pytest.fixture(scope="module", params=ALL_ENGINES)
def noise(request):
    """For each of three steps each parameter's noise, in standard deviations: what was released without the sum."""
    options = {"max_grad_norm": MAX_GRAD_NORM, "noise_multiplier": NOISE_MULTIPLIER, "seed": 3}
    # The losses are linear, so their gradients do not change from step to step.
    sums, _, _ = steps(ENGINES[request.param], CASE, BATCHES, **options)
    expected = [by_hand(CASE, batch, max_grad_norm=MAX_GRAD_NORM)[0] for batch in BATCHES]
    return [
        {name: value.numpy().ravel() / STDDEV for name, value in difference(got, clean).items()}
        for got, clean in zip(sums, expected, strict=True)
    ]


def test_every_parameter_gets_noise_of_the_promised_spread_in_every_step(noise):
    # The spread of n normals is known to a relative 1/sqrt(2n); float32 adds 1e-6.
    for step in noise:
        assert set(step) == {name for name, _ in CASE.module.named_parameters()}
        for name, values in step.items():
            if len(values) >= 30:
                assert np.sqrt(np.mean(values**2)) == pytest.approx(1.0, rel=LIMIT / sqrt(2 * len(values))), name
            assert (values != 0).all(), name


def test_the_spread_is_the_promised_one_to_a_hundredth(noise):
    values = np.concatenate([values for step in noise for values in step.values()])
    tolerance = 4 / sqrt(2 * len(values))  # 0.25 %
    assert np.std(values) == pytest.approx(1.0, abs=tolerance)
    assert 0.95 * np.std(values) != pytest.approx(1.0, abs=tolerance)
    assert 1.01 * np.std(values) != pytest.approx(1.0, abs=tolerance)


def test_the_noise_is_normal(noise):
    values = np.concatenate([values for step in noise for values in step.values()])
    assert max(map(abs, moments(values))) < LIMIT
    assert max(abs(tail(values, bound)) for bound in (1.0, 2.0, 3.0, 4.0)) < LIMIT
    assert kolmogorov(values) < 2.5  # above it once in 100,000


@pytest.mark.parametrize("lag", [1, 2, 3, CHUNK // 2, CHUNK, CHUNK + 1])
def test_neighbours_are_independent(noise, lag):
    for step in noise:
        values = step["unused.large.weight"]
        assert max(map(abs, correlations(values[:-lag], values[lag:]))) < LIMIT


def test_rows_and_columns_of_a_weight_are_independent(noise):
    # A lag of 1100 is one row.
    values = noise[0]["unused.large.weight"].reshape(400, 1100)
    for axis in (0, 1):
        spread = values.mean(axis) * sqrt(values.shape[axis])
        assert np.mean(spread**2) == pytest.approx(1.0, rel=LIMIT * sqrt(2 / len(spread)))


def test_steps_are_independent(noise):
    for one, other in ((0, 1), (1, 2), (0, 2)):
        for name, values in noise[one].items():
            assert max(map(abs, correlations(values, noise[other][name]))) < LIMIT, name
            assert not np.isclose(values, noise[other][name], rtol=1e-5, atol=0).any() or len(values) > 100, name


def test_parameters_are_independent(noise):
    step = noise[0]
    names = [name for name in step if len(step[name]) > 50]
    for position, name in enumerate(names):
        for other in names[:position]:
            count = min(len(step[name]), len(step[other]))
            assert max(map(abs, correlations(step[name][:count], step[other][:count]))) < LIMIT, (name, other)


@ENGINE
def test_noise_does_not_depend_on_the_users_drawn(engine):
    # The same chance with other batches: what is added to the sum is the same number for number.
    def noise_of(batch):
        options = {"max_grad_norm": MAX_GRAD_NORM, "noise_multiplier": NOISE_MULTIPLIER}
        sums, _, _ = steps(ENGINES[engine], CASE, [batch], **options)
        return difference(sums[0], by_hand(CASE, batch, max_grad_norm=MAX_GRAD_NORM)[0])

    nobody = noise_of([])
    for batch in ([0, 1, 2, 3], [2]):
        assert largest_gap(noise_of(batch), nobody) < 1e-5  # float32 beside noise of up to 9


@ENGINE
def test_the_noise_follows_the_clip_and_the_release_only(engine):
    def spread(**options):
        sums, _, _ = steps(ENGINES[engine], CASE, [[]], **options)
        return norm(sums[0])

    base = spread(max_grad_norm=1.0, noise_multiplier=1.0)
    assert spread(max_grad_norm=2.0, noise_multiplier=1.0) == pytest.approx(2 * base, rel=1e-5)
    assert spread(max_grad_norm=1.0, noise_multiplier=2.0) == pytest.approx(2 * base, rel=1e-5)
    # Of the sum, whatever the public number that it is divided by.
    assert spread(max_grad_norm=1.0, noise_multiplier=1.0, max_users=200) == pytest.approx(base, rel=1e-5)
    assert spread(max_grad_norm=1.0, noise_multiplier=1.0, seed=1) != pytest.approx(base, rel=1e-7)


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("users", [[0, 1, 2], []])
def test_a_padding_row_stays_as_it_is_and_every_other_row_is_noised(engine, padding, users):
    ids = torch.tensor([[0, 1, 4], [4, 4, 4], [0, 0, 0]])
    case = Case(nn.Embedding(5, 40, padding_idx=padding), lambda module, users: module(ids[users]).square().sum((1, 2)))
    sums, _, module = steps(ENGINES[engine], case, [users, users], noise_multiplier=1.0)
    assert torch.equal(module.weight[padding], torch.zeros(40))
    for step in sums:
        assert not step["weight"][padding].any()
        others = [row for row in range(5) if row != padding]
        # Noise of 160 numbers and at most two users' clipped gradients.
        assert float(step["weight"][others].std()) == pytest.approx(1.0, rel=LIMIT / sqrt(2 * 160) + 2 / 160)


@ENGINE
def test_a_frozen_layer_gets_none(engine):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    case = Case(module, lambda module, users: module(ROWS[users]).sum(1))
    _, _, after = steps(ENGINES[engine], case, [[0, 1], []], noise_multiplier=1.0)
    assert torch.equal(after[0].weight, module[0].weight)
    assert not torch.isclose(after[1].weight, module[1].weight).any()


@ENGINE
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_what_an_optimizer_remembers_is_a_noised_gradient(engine, kind):
    # Of users without a gradient, so that what is remembered is noise and nothing else, all of it.
    module = nn.Linear(3, 400, bias=False)
    optimizer = (
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        if kind == "momentum"
        else torch.optim.Adam(module.parameters(), lr=0.1, betas=(0.0, 0.999))
    )
    release = release_of(1, noise_multiplier=3.0, max_users=1, sample_rate=1.0)
    built = ENGINES[engine](module, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(0, "noise"))
    built.step(torch.zeros(2, 3), lambda users: module(users).sum(1))
    remembered = optimizer.state[module.weight]["momentum_buffer" if kind == "momentum" else "exp_avg"]
    assert float(remembered.std()) == pytest.approx(3.0, rel=4 / sqrt(2 * 1200))
