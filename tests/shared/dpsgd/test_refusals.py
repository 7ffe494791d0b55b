"""What clipping by user would miss is refused, and the message says what to use instead."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional as F

from shared.dpsgd.attach import attach
from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import ENGINES
from shared.dpsgd.layers import GRU, SparseBag
from shared.errors import FedAugError, RefusedError
from tests.shared.dpsgd.stepping import ALL_ENGINES, norm, release_of

ENGINE = pytest.mark.parametrize("engine", ALL_ENGINES)
USERS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def build(engine, module, *, num_steps=3):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    return ENGINES[engine](
        module, optimizer, release_of(num_steps), max_grad_norm=1.0, chance=Chance.seeded(0, "noise")
    )


def refused(module, losses, *, match, engine="bookkeeping", error=RefusedError, users=USERS):
    """One step is refused with this advice and leaves no trace, and nothing may be released any more."""
    before = copy.deepcopy(module.state_dict())
    built = build(engine, module)
    with pytest.raises(error, match=match):
        built.step(users, losses)
    assert all("forward" not in vars(layer) for layer in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(FedAugError, match="Nothing may be released"):
        built.executed()
    return built


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def encode(self, users):
        return self.layer(users) * self.scale


def half_frozen():
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    return layer


def tied():
    pair = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    pair[1].weight = pair[0].weight
    return pair


def tied_head():
    pair = nn.ModuleList([nn.Embedding(4, 4), nn.Linear(4, 4)])
    pair[1].weight = pair[0].weight
    return pair


def viewed(view):
    pair = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    memory = torch.zeros(6, 4)
    pair[0].weight = nn.Parameter(memory[:4])
    pair[1].weight = nn.Parameter(view(memory))
    return pair


WITHOUT_RULE = {
    "conv": (lambda: nn.Conv1d(4, 4, 1), "'1.weight'.*Build it from Linear, .*or choose the engine 'hooks'"),
    "lstm": (lambda: nn.LSTM(4, 4), "Use shared.dpsgd.layers.GRU"),
    "rnn": (lambda: nn.RNN(4, 4), "Use shared.dpsgd.layers.GRU"),
    "torch's gru": (lambda: nn.GRU(4, 4), "Use shared.dpsgd.layers.GRU"),
    "attention": (lambda: nn.MultiheadAttention(4, 1), "scaled_dot_product_attention"),
    "embedding bag": (lambda: nn.EmbeddingBag(4, 4), "Use shared.dpsgd.layers.SparseBag"),
    "group norm": (lambda: nn.GroupNorm(2, 4), "Build it from .*LayerNorm"),
    "a subclass": (lambda: type("Mine", (nn.Linear,), {})(4, 4), "Mine.*no book-keeping rule"),
    "bare parameter": (Bare, "'1.scale' has no book-keeping rule"),
    "half frozen": (half_frozen, "Freeze all of them or none"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "no book-keeping rule"),
    "one parameter in two layers": (
        tied,
        "'1.0.weight' and '1.1.weight' are one.*Give each layer parameters of its own",
    ),
    "tied output layer": (tied_head, "'1.0.weight' and '1.1.weight' are one"),
    "same memory": (lambda: viewed(lambda memory: memory[:4]), "are one"),
    "its transpose": (lambda: viewed(lambda memory: memory[:4].t()), "are one"),
    "overlapping memory": (lambda: viewed(lambda memory: memory[2:]), "or overlap"),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_layers_without_a_rule_are_refused_before_any_step(name):
    make, advice = WITHOUT_RULE[name]
    module = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(RefusedError, match=advice):
        build("bookkeeping", module)
    assert all("forward" not in vars(layer) for layer in module.modules())


def test_layers_beside_each_other_in_one_block_of_memory_are_no_tie():
    # As cuDNN packs a recurrent layer's weights.
    memory = torch.zeros(8, 4)
    pair = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    for layer, part in zip(pair, memory.split(4), strict=True):
        layer.weight = nn.Parameter(part)
    assert len(attach(pair)) == 2


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_layer_whose_weight_is_computed_is_refused():
    # Its type is still Linear, but its weight is no parameter any more.
    with pytest.raises(RefusedError, match=r"weight_g.*no book-keeping rule"):
        build("bookkeeping", nn.utils.weight_norm(nn.Linear(4, 4)))


MIXING = {
    "batch norm": (lambda: nn.BatchNorm1d(4), "Use torch.nn.LayerNorm"),
    "batch norm without memory": (lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False), "LayerNorm"),
    "instance norm with memory": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), "LayerNorm"),
    "frozen batch norm": (lambda: nn.BatchNorm1d(4).requires_grad_(False), "LayerNorm"),
    "renormalised embedding": (lambda: nn.Embedding(4, 4, max_norm=1.0), "Leave out max_norm"),
    "frozen renormalised embedding": (lambda: nn.Embedding(4, 4, max_norm=1.0).requires_grad_(False), "max_norm"),
    "embedding scaled by the batch": (lambda: nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "renormalised bag": (lambda: nn.EmbeddingBag(4, 4, max_norm=1.0), "Leave out max_norm"),
}


@pytest.mark.parametrize("name", MIXING)
@ENGINE
def test_layers_that_mix_or_remember_users_are_refused_by_every_engine(engine, name):
    make, advice = MIXING[name]
    with pytest.raises(RefusedError, match=advice):
        build(engine, nn.Sequential(nn.Linear(4, 4), make()))


def test_layer_norms_that_remember_nothing_are_not():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4))
    assert len(attach(module)) == 2


def test_ghost_refuses_padding():
    with pytest.raises(RefusedError, match="Use 'bookkeeping' or 'hooks'"):
        build("ghost", nn.Embedding(4, 4, padding_idx=0))


def test_a_layer_called_twice_is_refused():
    layer = nn.Linear(4, 4)
    built = refused(
        layer, lambda users: (layer(users) + layer(-users)).sum(1), match="called twice.*Stack the inputs into one call"
    )
    built.step(USERS, lambda users: layer(users).sum(1))  # the next loss may do better


def test_looking_without_gradients_is_no_second_call():
    layer = nn.Linear(4, 4)
    built = build("bookkeeping", layer)

    def losses(users):
        with torch.no_grad():
            target = layer(users) + layer(2 * users)
        return (layer(users) - target).square().sum(1)

    built.step(USERS, losses)
    assert built.num_zeroed == 0


@pytest.mark.parametrize("bags", [[[1, 1]], [[2, 1]], [[0, 1], [3, 3]], [[0], [], [1, 0]]])
@pytest.mark.parametrize("engine", ["bookkeeping", "ghost"])
def test_bags_out_of_order_are_refused(engine, bags):
    # Hooks form each user's gradient, in which a duplicate is added up.
    layer = SparseBag(4, 2)
    items, lengths = torch.tensor([item for bag in bags for item in bag]), torch.tensor([len(bag) for bag in bags])
    refused(
        layer,
        lambda users: layer(users.items, torch.ones(len(users.items)), users.starts).sum(1),
        match="strictly increasing.*Sort.*add up the weights of equal ones",
        engine=engine,
        users=Bags(items, lengths.cumsum(0) - lengths),
    )


def test_bags_in_order_are_not():
    # An item may come again in another user's bag, and bags may be empty, first, last or alone.
    for bags in ([[0, 3], [0, 3]], [[], [1], [0, 1], []], [[]]):
        layer = SparseBag(4, 2)
        lengths = torch.tensor([len(bag) for bag in bags])
        users = Bags(torch.tensor([i for bag in bags for i in bag], dtype=torch.int64), lengths.cumsum(0) - lengths)
        build("bookkeeping", layer).step(
            users, lambda users, layer=layer: layer(users.items, torch.ones(len(users.items)), users.starts).sum(1)
        )


REDUCED = {
    "sum": torch.sum,
    "mean": torch.mean,
    "one number": lambda losses: losses.sum()[None],
    "a column": lambda losses: losses[:, None],
    "too many": lambda losses: torch.cat([losses, losses]),
}


@pytest.mark.parametrize("name", REDUCED)
@ENGINE
def test_losses_that_are_not_one_per_user_are_refused(engine, name):
    layer = nn.Linear(4, 1)
    refused(
        layer,
        lambda users: REDUCED[name](layer(users)[:, 0]),
        match="one loss for each of 3 users.*Do not reduce them",
        engine=engine,
        error=ValueError,
    )


def test_a_gradient_penalty_is_refused():
    layer = nn.Linear(4, 4)

    def losses(users):
        users = users.clone().requires_grad_()
        outputs = layer(users).square().sum(1)
        (slopes,) = torch.autograd.grad(outputs.sum(), users, create_graph=True)
        return outputs + slopes.square().sum(1)

    refused(layer, losses, match="gradient of a gradient.*weight clipping in place of a gradient penalty")


def test_a_gradient_inside_a_loss_is_refused():
    layer = nn.Linear(4, 4)

    def losses(users):
        users = users.clone().requires_grad_()
        outputs = layer(users).square().sum(1)
        (slopes,) = torch.autograd.grad(outputs.sum(), users, retain_graph=True)
        return outputs + slopes.square().sum(1)

    refused(layer, losses, match="gradient twice.*one backward pass")


@pytest.mark.parametrize("engine", ["ghost", "hooks"])
@pytest.mark.parametrize("twice", [{"create_graph": True}, {"retain_graph": True}])
def test_opacus_refuses_gradients_inside_a_loss_in_its_own_words(engine, twice):
    layer = nn.Linear(4, 4)

    def losses(users):
        users = users.clone().requires_grad_()
        outputs = layer(users).square().sum(1)
        (slopes,) = torch.autograd.grad(outputs.sum(), users, **twice)
        return outputs + slopes.square().sum(1)

    refused(layer, losses, match="pop from empty list", engine=engine, error=IndexError)


def test_rows_that_are_not_users_are_refused():
    module = nn.ModuleDict({"places": nn.Linear(1, 4), "layer": nn.Linear(4, 1)})

    def losses(users):
        states = users[:, None] + module["places"](torch.arange(5.0)[:, None])
        return module["layer"](states).sum((1, 2))

    refused(module, losses, match="'places' saw 5 rows for 3 users.*first dimension", error=ValueError)


def test_positions_that_could_be_taken_for_users_are_refused():
    # As many positions as users: broadcast over users later, their gradient would be of all users at once.
    module = nn.ModuleDict({"places": nn.Embedding(3, 4), "layer": nn.Linear(4, 1)})

    def losses(users):
        return module["layer"](users[:, None] + module["places"](torch.arange(3))).sum((1, 2))

    refused(module, losses, match="Repeat positions for each user")


class TiedHead(nn.Module):
    """Logits by the rows of the embedding, as sequence models like to have them."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(5, 4)

    def forward(self, ids):
        return self.items(ids).sum(1) @ self.items.weight.t()


PAST = {
    "tied head": (TiedHead, lambda module, users: module(users.abs().long() % 5)),
    "called as a function": (lambda: nn.Linear(4, 4), lambda module, users: F.linear(users, module.weight)),
    "a penalty on weights": (lambda: nn.Linear(4, 4), lambda module, users: module(users) + module.weight.sum()),
    "bare parameter": (Bare, lambda module, users: module.encode(users)),
}


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(("bookkeeping", name) for name in PAST if name != "bare parameter"),  # which is refused before
        *(("ghost", name) for name in PAST),
        # Where a layer is called as well, hooks leave the rest of the gradient out: wrong, but nobody's privacy.
        ("hooks", "called as a function"),
        ("hooks", "bare parameter"),
    ],
)
def test_gradients_that_reach_a_parameter_past_its_layer_are_refused(engine, name):
    make, outputs = PAST[name]
    module = make()
    refused(
        module,
        lambda users: outputs(module, users).square().sum(1),
        match="past its layer.*Call the layer instead.*weight of its own",
        engine=engine,
    )


@ENGINE
@pytest.mark.parametrize(
    ("parameters", "numbers"),
    [
        (lambda module, other: module[0].parameters(), "moves 0 .* leaves out 2 "),
        (lambda module, other: [*module.parameters(), *other.parameters()], "moves 2 .* leaves out 0 "),
        (lambda module, other: other.parameters(), "moves 2 .* leaves out 4 "),
    ],
)
def test_an_optimizer_of_other_parameters_is_refused(engine, parameters, numbers):
    module, other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(parameters(module, other), lr=1.0)
    with pytest.raises(RefusedError, match=rf"{numbers}.*Build the optimizer from model.parameters\(\)"):
        ENGINES[engine](module, optimizer, release_of(), max_grad_norm=1.0, chance=Chance.seeded(0))


@ENGINE
def test_no_step_beyond_the_release(engine):
    layer = nn.Linear(4, 1)
    built = build(engine, layer, num_steps=2)
    for users in (USERS, USERS[:0]):
        built.step(users, lambda users: layer(users)[:, 0])
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RefusedError, match=r"2 step.*charge another release"):
        built.step(USERS, lambda users: layer(users)[:, 0])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert built.executed() == release_of(2)


@ENGINE
def test_a_refused_step_counts_and_does_no_harm_to_the_next(engine):
    layer, untouched = nn.Linear(4, 1), nn.Linear(4, 1)
    untouched.load_state_dict(layer.state_dict())
    built = build(engine, layer, num_steps=2)
    with pytest.raises(ValueError, match="one loss for each"):
        built.step(torch.ones(7, 4), lambda users: layer(users))
    built.step(USERS, lambda users: layer(users)[:, 0])
    build(engine, untouched).step(USERS, lambda users: untouched(users)[:, 0])
    assert torch.allclose(layer.weight, untouched.weight)
    assert not torch.allclose(layer.weight, torch.zeros(1))
    with pytest.raises(RefusedError, match="charge another release"):
        built.step(USERS, lambda users: layer(users)[:, 0])
    with pytest.raises(FedAugError, match="Nothing may be released"):
        built.executed()


@ENGINE
def test_frozen_layers_stay_as_they_are(engine):
    # Frozen layers need no rule: here a convolution.
    module = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    module[2].requires_grad_(False)
    module[4].requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    build(engine, module).step(USERS, lambda users: module(users).sum(1))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("0.")


class Last(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, size):
        super().__init__()
        self.cell = GRU(size, size)

    def forward(self, rows):
        return self.cell(rows[:, None].expand(-1, 3, -1))[:, -1]


@ENGINE
def test_outside_a_step_a_module_is_an_ordinary_one(engine):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Last(4), nn.Linear(4, 1))
    plain = copy.deepcopy(module)
    built = build(engine, module)
    for others in (7, 2):  # forwards with and without gradients, of other sizes, in training and out of it
        module(torch.ones(others, 4)).sum().backward()
        with torch.no_grad():
            module(torch.ones(others, 4))
        module.eval()
        assert torch.equal(module(USERS), plain(USERS))
        module.train()
        module.zero_grad()
        built.step(USERS, lambda users: module(users)[:, 0])
        fresh = copy.deepcopy(plain)
        build(engine, fresh).step(USERS, lambda users, fresh=fresh: fresh(users)[:, 0])
        for one, other in zip(module.parameters(), fresh.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-6)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module(USERS), plain(USERS))
    for each in (module, plain):
        each.zero_grad()
        each(USERS).sum().backward()
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@ENGINE
def test_modules_are_copied_and_stored_after_training_without_anything_of_a_user(engine):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    build(engine, module).step(USERS, lambda users: module(users)[:, 0])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(USERS), module(USERS))
        for layer in copied.modules():
            assert not vars(layer).get("activations")
        for parameter in copied.parameters():
            kept = [value for value in vars(parameter).values() if isinstance(value, torch.Tensor)]
            assert kept == []  # no gradient or norm of each user
    if engine == "bookkeeping":
        again = copy.deepcopy(module)
        build(engine, again).step(USERS, lambda users: again(users)[:, 0])
        assert not torch.equal(again[0].weight, module[0].weight)


def test_the_same_module_serves_round_after_round():
    module = nn.Linear(4, 1)
    seen = []
    for _ in range(3):
        build("bookkeeping", module, num_steps=1).step(USERS, lambda users: module(users)[:, 0])
        seen.append(module.weight.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    # Each round takes the same step, for the loss is linear: SGD of the sum of three rows over ten.
    assert torch.allclose(seen[2] - seen[1], seen[1] - seen[0], atol=1e-6)


def test_a_bag_from_a_matrix_is_what_attach_wants():
    matrix = sp.csr_matrix(np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]))
    users = Bags.from_rows(matrix, np.array([2, 1, 0, 2]))
    layer = SparseBag(4, 2)
    build("bookkeeping", layer).step(
        users, lambda users: layer(users.items, torch.ones(len(users.items)), users.starts).sum(1)
    )
    assert norm({"weight": layer.weight.detach()}) > 0
