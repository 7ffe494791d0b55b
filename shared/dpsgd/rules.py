"""Book-keeping rules: per-user norms and clipped sums of a layer's gradients, without forming a gradient per user.

A layer's gradient for one user is a product of what came in (its inputs) and what came back (the gradient of its
outputs). A rule keeps both during the one backward pass, which forms no weight gradients; norms follow from the two,
and once the users' clipping factors are known, one matrix product gives the clipped sum.

Source: Bu et al. 2023, arXiv:2210.00038 (book-keeping); Li et al. 2022, arXiv:2110.05679 (ghost norms).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from shared.dpsgd.bags import users_of
from shared.dpsgd.layers import GRU, ScaledBiasLinear, SparseBag
from shared.dpsgd.products import Products, floored_squares, squared_rows
from shared.errors import RefusedError


class Rule(ABC):
    """Watches one layer through one forward and one backward pass.

    Every tensor it keeps has the user as its first dimension, unless a rule says otherwise.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.anchor: Tensor = next(module.parameters())
        self._products: tuple[Products, ...] = ()
        self.clear()

    def clear(self) -> None:
        """Forget the last batch."""
        self._called = False
        self._inputs: tuple[Tensor, ...] = ()
        self._gradient: Tensor | None = None
        self._sums: tuple[Tensor, ...] = ()
        for products in self._products:
            products.clear()

    @property
    def recorded(self) -> bool:
        """Whether a gradient came back since :meth:`clear`."""
        return self._gradient is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Stands in for the layer's forward.

        Raises:
            RefusedError: the layer was called before in this step.
        """
        if not torch.is_grad_enabled():
            return type(self.module).forward(self.module, *inputs)  # type: ignore[no-any-return]
        if self._called:
            raise RefusedError(
                f"layer {self.name!r} was called twice in one step: the norm of the sum of its two gradients would be"
                " missed. Stack the inputs into one call, or use two layers."
            )
        self._called = True
        output: Tensor = _Watched.apply(self, self.anchor, *inputs)  # type: ignore[no-untyped-call]
        return output

    def record(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        if self._gradient is not None:
            raise RefusedError(
                f"layer {self.name!r} got a gradient twice in one step. Take one backward pass over the vector of"
                " losses; gradients inside a loss are not supported."
            )
        self._inputs, self._gradient = inputs, gradient

    def drop(self, keep: Tensor) -> None:
        """Make the users where ``keep`` is false zero, whatever they hold."""
        assert self._gradient is not None
        self._inputs = tuple(_zero_rows(value, keep) for value in self._inputs)
        self._gradient = _zero_rows(self._gradient, keep)

    def problem(self) -> tuple[Tensor, str] | None:
        """A 0-d bool, true where the batch must be refused, and why; read once with the norms."""
        return None

    @property
    def num_users(self) -> int:
        assert self._gradient is not None
        return len(self._gradient)

    @abstractmethod
    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and what :meth:`pull_back` and the norms need."""

    @abstractmethod
    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        """Record the gradient; return that of the inputs where ``wanted``."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Squared L2 norm of each user's gradient over the layer's parameters, shape ``(num_users,)``."""

    @abstractmethod
    def add_clipped(self, factors: Tensor) -> None:
        """Add ``Σ factors[u] · gradient[u]`` to the parameters' ``grad``."""

    def erase_noise(self) -> None:  # noqa: B027  # most layers have nothing to erase
        """Zero the noise of numbers that are not parameters, before sums are added."""


class _Watched(Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, anchor: Tensor, *inputs: Tensor) -> Tensor:
        output, kept = rule.compute(*inputs)
        ctx.rule, ctx.num_inputs = rule, len(inputs)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RefusedError(
                f"layer {ctx.rule.name!r} was asked for a gradient of a gradient, which book-keeping does not have. Use"
                " a loss without one: weight clipping in place of a gradient penalty."
            )
        back = ctx.rule.pull_back(ctx.saved_tensors, gradient, wanted=ctx.needs_input_grad[2])
        return None, None, back, *(None for _ in range(ctx.num_inputs - 1))


class LinearRule(Rule):
    """``F.linear`` over inputs of shape ``(num_users, [any number of places,] in_features)``."""

    module: nn.Linear

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        scale = float(getattr(module, "bias_scale", 1.0))
        self._products = (Products(self.module.weight, self.module.bias, scale),)

    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return type(self.module).forward(self.module, *inputs), inputs

    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        self.record(kept, gradient)
        return gradient @ self.module.weight if wanted else None

    def squared_norms(self) -> Tensor:
        assert self._gradient is not None
        return self._products[0].squared_norms(_places(self._inputs[0]), _places(self._gradient))

    def add_clipped(self, factors: Tensor) -> None:
        assert self._gradient is not None
        self._products[0].add_clipped(_places(self._inputs[0]), _places(self._gradient), factors)


class SparseBagRule(Rule):
    """:class:`~shared.dpsgd.layers.SparseBag`."""

    module: SparseBag

    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.module.forward(*inputs), inputs

    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        self.record(kept, gradient)
        return None

    def drop(self, keep: Tensor) -> None:
        assert self._gradient is not None
        items, weights, starts = self._inputs
        users = users_of(starts, len(items))
        self._inputs = items, weights.masked_fill(~keep[users], 0.0), starts
        self._gradient = _zero_rows(self._gradient, keep)

    def problem(self) -> tuple[Tensor, str] | None:
        items, _, starts = self._inputs
        within = torch.ones(len(items) + 1, dtype=torch.bool, device=items.device)
        within[starts] = False  # a user's first item follows another user's
        unordered = ((items[1:] <= items[:-1]) & within[1:-1]).any()
        return unordered, (
            f"layer {self.name!r} got a bag whose items are not strictly increasing: the norm of a duplicate would be"
            " missed. Sort each user's items and add up the weights of equal ones."
        )

    def squared_norms(self) -> Tensor:
        assert self._gradient is not None
        items, weights, starts = self._inputs
        squares = torch.zeros(len(starts), dtype=weights.dtype, device=weights.device)
        squares.index_add_(0, users_of(starts, len(items)), weights.square())
        return floored_squares(self._gradient) * (squares + 1.0)

    def add_clipped(self, factors: Tensor) -> None:
        assert self._gradient is not None
        items, weights, starts = self._inputs
        scaled = self._gradient * factors[:, None]
        _grad(self.module.bias).add_(scaled.sum(0))
        users = users_of(starts, len(items))
        if items.is_cuda:
            _grad(self.module.weight).index_add_(0, items, scaled[users] * weights[:, None])
            return
        # On a CPU: one sum per item that occurs, so that no row per entry is written.
        order = torch.argsort(items)
        touched, counts = torch.unique_consecutive(items[order], return_counts=True)
        begins = counts.cumsum(0) - counts
        sums = F.embedding_bag(users[order], scaled, begins, mode="sum", per_sample_weights=weights[order])
        _grad(self.module.weight).index_add_(0, touched, sums)


class EmbeddingRule(Rule):
    """:class:`torch.nn.Embedding` over ids of shape ``(num_users, places)``; the padding row stays as it is."""

    module: nn.Embedding

    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if inputs[0].dim() < 2:
            # Positions, broadcast over users later, look like one id per user where there are as many of both.
            raise RefusedError(
                f"layer {self.name!r} got ids of shape {tuple(inputs[0].shape)}, and needs (num_users, places). Repeat"
                " positions for each user; write one id per user as ids[:, None]."
            )
        return self.module.forward(*inputs), inputs

    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        self.record(kept, gradient)
        return None

    def squared_norms(self) -> Tensor:
        # The places of one user with one id share a row of the gradient: sum them first, then square.
        ids, users, rows = self._rows()
        order = torch.argsort(users * self.module.num_embeddings + ids)
        ids, users, rows = ids[order], users[order], rows[order]
        begins = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        begins[1:] = (ids[1:] != ids[:-1]) | (users[1:] != users[:-1])
        group = begins.cumsum(0) - 1
        # Kept, since these sums and no others are added later: places that cancel would round to another sum there, of
        # a size that no norm knows, and wash out the noise of their row.
        sums = torch.zeros_like(rows).index_add_(0, group, rows)
        of_ids = torch.zeros_like(ids).scatter_(0, group, ids)
        of_users = torch.zeros_like(users).scatter_(0, group, users)
        self._sums = sums, of_ids, of_users
        norms = torch.zeros(self.num_users, dtype=rows.dtype, device=rows.device)
        return norms.index_add_(0, of_users, squared_rows(sums))

    def add_clipped(self, factors: Tensor) -> None:
        sums, of_ids, of_users = self._sums
        _grad(self.module.weight).index_add_(0, of_ids, sums * factors[of_users][:, None])

    def erase_noise(self) -> None:
        if self.module.padding_idx is not None:
            _grad(self.module.weight)[self.module.padding_idx].zero_()

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, users and gradients of all places, padding ones zero."""
        assert self._gradient is not None
        ids = self._inputs[0]
        gradient = self._gradient
        if self.module.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.module.padding_idx)[..., None], 0.0)
        users = torch.arange(len(ids), device=ids.device).repeat_interleave(ids[0].numel() if len(ids) else 0)
        return ids.reshape(-1), users, gradient.reshape(-1, gradient.shape[-1])


class LayerNormRule(Rule):
    """:class:`torch.nn.LayerNorm` over the last dimensions."""

    module: nn.LayerNorm

    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer, values = self.module, inputs[0]
        output, mean, rstd = torch.native_layer_norm(
            values, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )
        return output, (values, mean, rstd)

    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        self.record(kept, gradient)
        if not wanted:
            return None
        layer, (values, mean, rstd) = self.module, kept
        back: Tensor = torch.ops.aten.native_layer_norm_backward(
            gradient, values, layer.normalized_shape, mean, rstd, layer.weight, layer.bias, [True, False, False]
        )[0]
        return back

    def squared_norms(self) -> Tensor:
        assert self._gradient is not None
        values, mean, rstd = self._inputs
        size = self.module.weight.numel()
        scales = ((values - mean) * rstd).mul_(self._gradient)
        self._sums = (scales.reshape(self.num_users, -1, size).sum(1),)
        if self.module.bias is not None:
            self._sums += (self._gradient.reshape(self.num_users, -1, size).sum(1),)
        return torch.stack([squared_rows(sums) for sums in self._sums]).sum(0)

    def add_clipped(self, factors: Tensor) -> None:
        for parameter, sums in zip((self.module.weight, self.module.bias), self._sums, strict=False):
            _grad(parameter).view(-1).addmv_(sums.t(), factors)


class GRURule(Rule):
    """:class:`~shared.dpsgd.layers.GRU`: the backward pass through time, written out."""

    module: GRU

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        cell = self.module
        self._products = (
            Products(cell.weight_ih_l0, cell.bias_ih_l0),
            Products(cell.weight_hh_l0, cell.bias_hh_l0),
        )

    def compute(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        cell, size = self.module, self.module.hidden_size
        values = inputs[0]
        # Time first, so that each step reads and writes whole blocks.
        given = F.linear(values.transpose(0, 1), cell.weight_ih_l0, cell.bias_ih_l0)
        num_steps, num_users = given.shape[:2]
        states = values.new_zeros(num_steps + 1, num_users, size)
        gates = values.new_empty(num_steps, num_users, 3 * size)
        recalled = values.new_empty(num_steps, num_users, size)
        transposed = cell.weight_hh_l0.t()
        for step in range(num_steps):
            before = states[step]
            inner = torch.addmm(cell.bias_hh_l0, before, transposed)
            recalled[step] = inner[:, 2 * size :]
            torch.add(given[step, :, : 2 * size], inner[:, : 2 * size], out=gates[step, :, : 2 * size])
            reset, update, new = (gates[step, :, k * size : (k + 1) * size] for k in range(3))
            gates[step, :, : 2 * size].sigmoid_()
            torch.addcmul(given[step, :, 2 * size :], reset, recalled[step], out=new).tanh_()
            torch.lerp(new, before, update, out=states[step + 1])
        return states[1:].transpose(0, 1), (values, states, gates, recalled)

    def pull_back(self, kept: tuple[Tensor, ...], gradient: Tensor, *, wanted: bool) -> Tensor | None:
        values, states, gates, recalled = kept
        cell, size = self.module, self.module.hidden_size
        reset, update, new = gates.chunk(3, dim=2)
        # What multiplies the gradient of a state on its way into each gate; no step depends on another here.
        to_new = (1.0 - update) * (1.0 - new.square())
        to_update = (states[:-1] - new) * update * (1.0 - update)
        to_reset = recalled * reset * (1.0 - reset)
        into_states = torch.empty_like(gates)
        into_new = torch.empty_like(recalled)
        carried = torch.zeros_like(states[0])
        for step in range(len(gates) - 1, -1, -1):
            arrived = carried + gradient[:, step]
            row = into_states[step]
            torch.mul(arrived, to_new[step], out=into_new[step])
            torch.mul(into_new[step], to_reset[step], out=row[:, :size])
            torch.mul(arrived, to_update[step], out=row[:, size : 2 * size])
            torch.mul(into_new[step], reset[step], out=row[:, 2 * size :])
            carried = torch.addmm(arrived * update[step], row, cell.weight_hh_l0)
        into_inputs = torch.cat([into_states[:, :, : 2 * size], into_new], dim=2)
        self.record((values, states[:-1].transpose(0, 1), into_states.transpose(0, 1)), into_inputs.transpose(0, 1))
        return (into_inputs @ cell.weight_ih_l0).transpose(0, 1) if wanted else None

    def squared_norms(self) -> Tensor:
        assert self._gradient is not None
        values, before, into_states = self._inputs
        from_inputs, from_states = self._products
        return from_inputs.squared_norms(values, self._gradient) + from_states.squared_norms(before, into_states)

    def add_clipped(self, factors: Tensor) -> None:
        assert self._gradient is not None
        values, before, into_states = self._inputs
        from_inputs, from_states = self._products
        from_inputs.add_clipped(values, self._gradient, factors)
        from_states.add_clipped(before, into_states, factors)

    def formed(self) -> dict[Tensor, Tensor]:
        """Each parameter's gradient for each user, ``(num_users, *parameter.shape)``: for engines that need them."""
        assert self._gradient is not None
        values, before, into_states = self._inputs
        cell = self.module
        return {
            cell.weight_ih_l0: torch.einsum("utg,uti->ugi", self._gradient, values),
            cell.weight_hh_l0: torch.einsum("utg,uti->ugi", into_states, before),
            cell.bias_ih_l0: self._gradient.sum(1),
            cell.bias_hh_l0: into_states.sum(1),
        }


RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    ScaledBiasLinear: LinearRule,
    SparseBag: SparseBagRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    GRU: GRURule,
}


def _places(values: Tensor) -> Tensor:
    """``values`` of shape ``(num_users, [places,] size)`` as ``(num_users, num_places, size)``."""
    if values.dim() == 3:
        return values
    return values.reshape(len(values), -1, values.shape[-1]) if len(values) else values.reshape(0, 1, values.shape[-1])


def _zero_rows(values: Tensor, keep: Tensor) -> Tensor:
    return values.masked_fill(~keep.view(-1, *(1 for _ in values.shape[1:])), 0)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
