"""Every layer's clipped sum is that of a loop over users, whatever the shapes, by every engine."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.dpsgd import products
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES
from shared.dpsgd.layers import GRU, ScaledBiasLinear
from tests.shared.dpsgd.models import MODELS, bag_case, model_case, numbers, read_out, refilled
from tests.shared.dpsgd.stepping import ALL_ENGINES, Case, by_hand, largest_gap, norm, release_of, released, steps

# Relative to the largest number added: 5000 and 80 roundings, for sums of a few hundred terms.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
examples = settings(deadline=None, max_examples=25)

seeds, few = st.integers(0, 2**16), st.integers(0, 5)


def sizes(dtype: torch.dtype) -> st.SearchStrategy[int]:
    # In float32 a norm is rounded up where places cancel to 2 % of their size (products.py): a matter of privacy, which
    # test_adversarial.py looks after. From three dimensions on chance does not get there.
    return st.integers(1 if dtype == torch.float64 else 3, 6)


@contextmanager
def regime(kept: int, chunk: int):
    """The limits of products.py: with ``kept`` 0 no gradient is formed, with ``chunk`` 1 users go one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_KEPT", kept)
        patch.setattr(products, "_CHUNK", chunk)
        yield


regimes = st.tuples(st.sampled_from([0, 1 << 24]), st.sampled_from([1, 100, 1 << 18]))


def check(case: Case, num_users: int, dtype: torch.dtype, engines=ALL_ENGINES) -> None:
    """By each engine: the loop's sum, over everybody, over all but one, over one alone and over nobody."""
    everybody = list(range(num_users))
    for users in {tuple(everybody), tuple(everybody[1:]), tuple(everybody[:1])}:
        expected, largest = by_hand(case, users)
        # With nobody there is no number to compare with; what remains is the noise, of 1e-18.
        tolerance = TOLERANCES[dtype] * (largest or 1.0)
        sums = {name: released(ENGINES[name], case, users) for name in engines}
        for name, got in sums.items():
            assert largest_gap(got, expected) <= tolerance, f"{name}, {len(users)} users"
        assert largest_gap(sums["bookkeeping"], sums["hooks"]) <= tolerance


@DTYPES
@given(data=st.data(), seed=seeds, num_users=few, limits=regimes)
@examples
def test_linear(dtype, data, seed, num_users, limits):
    draw = numbers(seed, dtype)
    width, height = data.draw(sizes(dtype)), data.draw(sizes(dtype))
    places = data.draw(st.lists(st.integers(1, 5), max_size=2))
    bias = data.draw(st.sampled_from(["none", "plain", "scaled"]))
    module = (
        ScaledBiasLinear(width, height, bias_scale=data.draw(st.sampled_from([0.3, 5.0])))
        if bias == "scaled"
        else nn.Linear(width, height, bias=bias == "plain")
    )
    with regime(*limits):
        check(read_out(module, draw(num_users, *places, width), (*places, height), draw), num_users, dtype)


@DTYPES
@given(
    seed=seeds,
    size=st.integers(1, 4),
    bags=st.lists(
        st.dictionaries(st.integers(0, 6), st.one_of(st.just(0.0), st.floats(-3, 3, width=32)), max_size=7), max_size=5
    ),
)
@examples
def test_sparse_bag(dtype, seed, size, bags):
    ascending = [sorted(bag.items()) for bag in bags]
    check(bag_case(ascending, 7, size, numbers(seed, dtype)), len(bags), dtype)


@DTYPES
@given(
    data=st.data(),
    seed=seeds,
    num_users=few,
    num_items=st.integers(1, 5),
    places=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    padded=st.booleans(),
    all_padding=st.booleans(),
)
@examples
def test_embedding(dtype, data, seed, num_users, num_items, places, padded, all_padding):
    draw = numbers(seed, dtype)
    padding = data.draw(st.integers(0, num_items - 1)) if padded else None
    ids = (draw(num_users, *places).abs() * 2).long().clamp(max=num_items - 1)  # small ids often: repeats
    if padded and all_padding:
        ids[:1] = padding
    module = nn.Embedding(num_items, 3, padding_idx=padding)
    case = read_out(module, ids, (*places, 3), draw)
    check(case, num_users, dtype, [name for name in ALL_ENGINES if name != "ghost" or not padded])


@DTYPES
@given(
    data=st.data(),
    seed=seeds,
    num_users=few,
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    places=st.lists(st.integers(1, 4), max_size=2),
    bias=st.booleans(),
)
@examples
def test_layer_norm(dtype, data, seed, num_users, shape, places, bias):
    draw = numbers(seed, dtype)
    # Numbers that lie close together are known to few digits without their mean: these lie apart.
    rows = draw(num_users, *places, *shape) + 3.0 * torch.arange(math.prod(shape)).view(shape)
    check(read_out(nn.LayerNorm(shape, bias=bias), rows, (*places, *shape), draw), num_users, dtype)


@DTYPES
@given(data=st.data(), seed=seeds, num_users=few, num_places=st.integers(1, 5), limits=regimes)
@examples
def test_gru(dtype, data, seed, num_users, num_places, limits):
    # By hand it is torch.nn.GRU, whose backward pass is torch's own.
    draw = numbers(seed, dtype)
    size, hidden = data.draw(sizes(dtype)), data.draw(sizes(dtype))
    with regime(*limits):
        case = read_out(GRU(size, hidden), draw(num_users, num_places, size), (num_places, hidden), draw)
        check(case, num_users, dtype)


@DTYPES
@pytest.mark.parametrize("name", MODELS)
@given(seed=seeds, limits=regimes)
@settings(deadline=None, max_examples=5)
def test_models(dtype, name, seed, limits):
    with regime(*limits):
        engines = [engine for engine in ALL_ENGINES if engine != "ghost" or not name.startswith("padded")]
        check(model_case(name, seed, 4, dtype), 4, dtype, engines)


@pytest.mark.parametrize("name", MODELS)
def test_trajectories_with_noise_agree(name):
    # The same chance gives every engine the same noise; Adam's division makes a gap of 1e-16 a few thousand times
    # larger where a gradient is small. Wrong noise or a wrong sum would be a gap of about 1.
    case = model_case(name, 5, 6, torch.float64)
    batches = [[0, 1, 2, 3], [], [4, 5, 0], [1], [2, 2, 5]]
    after = {}
    for engine in ALL_ENGINES:
        if engine == "ghost" and name.startswith("padded"):
            continue
        after[engine] = trained_by_adam(engine, case, batches)
    for engine, weights in after.items():
        for key, value in weights.items():
            assert torch.allclose(value, after["hooks"][key], rtol=0, atol=1e-9), (engine, key)
        moved = max(float((value - case.module.state_dict()[key]).abs().max()) for key, value in weights.items())
        assert moved > 0.01


def trained_by_adam(engine, case, batches):
    module = copy.deepcopy(case.module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    release = release_of(len(batches), noise_multiplier=0.5)
    built = ENGINES[engine](module, optimizer, release, max_grad_norm=1.0, chance=Chance.seeded(3, "noise"))
    for batch in batches:
        built.step(torch.tensor(batch, dtype=torch.int64), lambda users: case.losses(module, users))
    assert built.executed() == release
    return module.state_dict()


VIEWED = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "scaled": (lambda: ScaledBiasLinear(4, 3, bias_scale=2.0), (4,)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "gru": (lambda: GRU(4, 3), (4,)),
    "embedding": (lambda: nn.Embedding(4, 3), ()),
}


@pytest.mark.parametrize("name", VIEWED)
@pytest.mark.parametrize("kept", [0, 1 << 24])
def test_memory_may_lie_in_any_order(name, kept):
    # Inputs that are strided views; outputs whose gradients are one number expanded, or strided views themselves.
    make, row = VIEWED[name]
    draw = numbers(1, torch.float64)
    base = draw(5, *row, 6)  # time last
    base = base.abs().long().clamp(max=3) if name == "embedding" else base
    for read in (lambda out: out.sum((1, 2)), lambda out: out.transpose(1, 2).reshape(len(out), -1)[:, ::2].sum(1)):
        case = Case(
            refilled(make(), draw),
            lambda module, users, read=read: read(module(base[users].movedim(-1, 1))),
        )
        with regime(kept, 1 << 18):
            check(case, 5, torch.float64)
    # The same row for everybody, expanded.
    case = Case(
        refilled(make(), draw),
        lambda module, users: module(base[:1].movedim(-1, 1).expand(len(users), *[-1] * (base.dim() - 1))).sum((1, 2)),
    )
    with regime(kept, 1 << 18):
        check(case, 5, torch.float64, [engine for engine in ALL_ENGINES if name != "embedding" or engine != "ghost"])


@pytest.mark.parametrize("name", MODELS)
def test_the_users_above_lie_on_both_sides_of_the_clip(name):
    # The equalities would mean little if everybody were clipped, or nobody.
    case = model_case(name, 0, 8, torch.float64)
    norms = [norm(by_hand(case, [user], max_grad_norm=1e9)[0]) for user in range(8)]
    assert min(norms) < 0.8
    assert max(norms) > 2.0


def test_a_step_moves_the_weights_by_what_the_optimizer_was_given():
    case = model_case("vae", 1, 4, torch.float64)
    sums, _, module = steps(ENGINES["bookkeeping"], case, [[0, 1, 2, 3]])
    for name, before in case.module.state_dict().items():
        assert torch.allclose(before - module.state_dict()[name], sums[0][name] / 10.0, rtol=0, atol=1e-15)
