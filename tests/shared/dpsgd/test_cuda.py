"""On a GPU: the same sums, the promised noise, and one wait per step."""

import copy
import warnings
from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES
from shared.dpsgd.layers import GRU, ScaledBiasLinear, SparseBag
from tests.shared.dpsgd.models import numbers, refilled
from tests.shared.dpsgd.normality import correlations, kolmogorov, moments, tail
from tests.shared.dpsgd.stepping import Descent, release_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_USERS, NUM_ITEMS = 6, 9


class Everything(nn.Module):
    """Every layer that has a rule, over bags and the same items as sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = SparseBag(NUM_ITEMS, 5)
        self.items = nn.Embedding(NUM_ITEMS, 5, padding_idx=0)
        self.cell, self.norm = GRU(5, 5), nn.LayerNorm(5)
        self.few, self.many = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
        self.last = ScaledBiasLinear(4, 3, bias_scale=2.0)

    def losses(self, users: Bags, sequences: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(len(users.items), dtype=scales.dtype, device=scales.device)
        states = self.norm(self.cell(self.items(sequences)))
        hidden = torch.tanh(self.few(states).sum(1) + self.many(self.bag(users.items, weights, users.starts)))
        return scales * self.last(hidden).square().sum(1)


def case(dtype: torch.dtype, device: str):
    draw = numbers(3, dtype)
    module = refilled(Everything(), draw)
    lengths = torch.tensor([3, 0, 1, 4, 2, 3])
    items = torch.cat([torch.arange(length) * 2 for length in lengths.tolist()])
    users = Bags(items, lengths.cumsum(0) - lengths)
    sequences = (draw(NUM_USERS, 7).abs() * 4).long().clamp(max=NUM_ITEMS - 1)
    scales = 10.0 ** draw(NUM_USERS)
    return module.to(device), users.to(torch.device(device)), sequences.to(device), scales.to(device)


def released_on(device: str, dtype: torch.dtype, engine: str) -> dict[str, torch.Tensor]:
    module, users, sequences, scales = case(dtype, device)
    descent = Descent(module)
    built = ENGINES[engine](module, descent, release_of(), max_grad_norm=1.0, chance=Chance.seeded(0))
    built.step(users, lambda users: module.losses(users, sequences, scales))
    return {name: value.cpu() for name, value in descent.given[0].items()}


@pytest.fixture(autouse=True)
def exact_products():
    # TF32 has ten bits; what is compared here is the rules, not the hardware's rounding.
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_sum_is_that_of_a_cpu(dtype, tolerance):
    expected = released_on("cpu", dtype, "hooks")
    got = released_on("cuda", dtype, "bookkeeping")
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= tolerance * largest, name


def test_a_user_who_is_not_finite_counts_as_zero():
    module, users, sequences, scales = case(torch.float32, "cuda")
    sums = []
    for poison in (0.0, torch.nan):
        copied, poisoned = copy.deepcopy(module), scales.clone()
        poisoned[2] = poison
        descent = Descent(copied)
        built = ENGINES["bookkeeping"](copied, descent, release_of(), max_grad_norm=1.0, chance=Chance.seeded(0))
        built.step(users, lambda users, to=copied, by=poisoned: to.losses(users, sequences, by))
        sums.append(descent.given[0])
        assert built.num_zeroed == (poison != 0.0)
    for name, value in sums[0].items():
        # Sums by atomic additions come in any order.
        assert torch.allclose(value, sums[1][name], rtol=0, atol=1e-6), name


def noise_of_steps(num_steps: int) -> list[np.ndarray]:
    module = nn.Linear(1000, 1000, bias=False).cuda()
    descent = Descent(module)
    release = release_of(num_steps, noise_multiplier=2.0)
    built = ENGINES["bookkeeping"](module, descent, release, max_grad_norm=0.5, chance=Chance.seeded(0))
    for _ in range(num_steps):
        built.step(torch.zeros(0, 1000).cuda(), lambda users: module(users).sum(1))
    return [step["weight"].cpu().double().numpy().ravel() * release.expected_batch for step in descent.given]


def test_the_noise_is_normal_and_white():
    one, other = noise_of_steps(2)
    assert np.std(one) == pytest.approx(1.0, abs=4 / sqrt(2 * len(one)))
    assert 0.95 * np.std(one) != pytest.approx(1.0, abs=4 / sqrt(2 * len(one)))
    assert max(map(abs, moments(one))) < 5.5
    assert max(abs(tail(one, bound)) for bound in (1.0, 2.0, 3.0, 4.0)) < 5.5
    assert kolmogorov(one) < 2.5
    assert max(map(abs, correlations(one, other))) < 5.5
    for lag in (1, 2, 1000, 4096, 65536):
        assert max(map(abs, correlations(one[:-lag], one[lag:]))) < 5.5


def test_large_tensors_are_filled_in_parts_that_differ():
    values = torch.full(((1 << 22) * 2 + 5,), torch.nan, device="cuda")
    Chance.secret().fill_normal(values, stddev=1.0)
    assert torch.isfinite(values).all()
    assert float(values.std()) == pytest.approx(1.0, abs=4 / sqrt(2 * len(values)))
    first, second = values[: 1 << 22], values[1 << 22 : 2 << 22]
    assert abs(float((first * second).mean())) < 5.5 / sqrt(1 << 22)


def test_a_step_waits_for_the_gpu_once():
    module, users, sequences, scales = case(torch.float32, "cuda")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    built = ENGINES["bookkeeping"](module, optimizer, release_of(2), max_grad_norm=1.0, chance=Chance.seeded(0))
    built.step(users, lambda users: module.losses(users, sequences, scales))  # cuDNN and cuBLAS wait when they start
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built.step(users, lambda users: module.losses(users, sequences, scales))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    # The norms and the problems, read together.
    assert len(waits) == 1, waits


def test_noise_and_sums_wait_for_nothing():
    module, users, sequences, scales = case(torch.float32, "cuda")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    built = ENGINES["bookkeeping"](module, optimizer, release_of(2), max_grad_norm=1.0, chance=Chance.seeded(0))
    built.step(users, lambda users: module.losses(users, sequences, scales))
    built._backward(users, lambda users: module.losses(users, sequences, scales))
    torch.cuda.set_sync_debug_mode("error")
    try:
        built._optimizer.pre_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
