"""The same steps by Opacus' own clipping: slower, and so an oracle and a fallback."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import (
    AbstractGradSampleModule,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
    register_norm_sampler,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _mark_as_processed
from torch import Tensor, nn
from torch.nn import functional as F

from shared.dpsgd.attach import refuse_mixed_users
from shared.dpsgd.bags import users_of
from shared.dpsgd.chance import Chance
from shared.dpsgd.engine import LARGEST_NORM, DpSgd, Users, one_per_user
from shared.dpsgd.layers import GRU, ScaledBiasLinear, SparseBag
from shared.dpsgd.rules import GRURule
from shared.errors import RefusedError

Formed = dict[Tensor, Tensor]

# The first layer's input is data and needs no gradient, which is what this warning is about; Opacus hooks what it must.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)


class HooksDpSgd(DpSgd):
    """By forming every user's gradient: memory of the batch times the parameters."""

    def _prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, terms: dict[str, float], chance: Chance
    ) -> DPOptimizer:
        refuse_mixed_users(module)
        self._padded = _padded_embeddings(module)
        self._hooked = GradSampleModule(module, loss_reduction="sum")
        self._hooked.train()
        self._hooked.disable_hooks()
        wrapped = _HooksOptimizer(optimizer, **terms)
        wrapped.chance, wrapped.padded = chance, self._padded
        return wrapped

    def _backward(self, users: Users, losses: Callable[[Any], Tensor]) -> Tensor:
        counted = torch.zeros(0)
        self._optimizer.zero_grad()
        if len(users):
            with _recording(self._hooked):
                counted = one_per_user(losses(users), users)
                counted.sum().backward()  # type: ignore[no-untyped-call]
            _refuse_past_the_layers(
                self._hooked, counted, lambda _, parameter: 0 if parameter.grad_sample is None else math.inf
            )
        counted = counted.detach()
        for parameter in self._optimizer.params:
            if parameter.grad_sample is None:  # a layer that the losses did not use
                parameter.grad_sample = torch.zeros(len(users), *parameter.shape).to(parameter)
        for layer in self._padded:
            formed: Tensor = layer.weight.grad_sample  # type: ignore[attr-defined]
            formed[:, layer.padding_idx] = 0.0
        flat = [parameter.grad_sample.reshape(len(users), parameter.numel()) for parameter in self._optimizer.params]
        norms = torch.stack([rows.norm(dim=1) for rows in flat]).norm(dim=0)
        keep = torch.isfinite(counted) & (norms <= LARGEST_NORM)
        for parameter in self._optimizer.params:
            parameter.grad_sample[~keep] = 0.0
        return counted[keep]


class GhostDpSgd(DpSgd):
    """By Opacus' ghost clipping: norms first, then a second backward pass over the clipped losses.

    For simulations. Norm and sum come from two computations, so at inputs of 1e10 and more, rounding lets a user of an
    embedding, a layer norm or a GRU exceed the clip; and where one user is not finite, the others' losses are drawn
    anew.
    """

    def _prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, terms: dict[str, float], chance: Chance
    ) -> DPOptimizer:
        refuse_mixed_users(module)
        if _padded_embeddings(module):
            raise RefusedError(
                "the engine 'ghost' counts the padding row of an embedding as a parameter. Use 'bookkeeping' or"
                " 'hooks'."
            )
        self._hooked = GradSampleModuleFastGradientClipping(
            module, max_grad_norm=terms["max_grad_norm"], use_ghost_clipping=True, loss_reduction="sum"
        )
        self._hooked.train()
        self._hooked.disable_hooks()
        wrapped = _GhostOptimizer(optimizer, **terms)
        wrapped.chance, wrapped.padded = chance, []
        return wrapped

    def _backward(self, users: Users, losses: Callable[[Any], Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        counted = torch.zeros(0)
        while len(users):
            counted, coefficients = self._forward(users, losses)
            keep = torch.isfinite(counted) & torch.isfinite(coefficients)
            if bool(keep.all()):
                (coefficients * counted).sum().backward()  # type: ignore[no-untyped-call]
                break
            # Clipping cannot mend infinity times zero: the others are computed anew, without these users. That draws
            # new latents, which may overflow for one more; every turn leaves fewer users, so it ends.
            users, counted = users[keep], counted[:0]
        for parameter in self._optimizer.params:
            if parameter.grad is None:  # nobody is left, or a layer that the losses did not use
                parameter.grad = torch.zeros_like(parameter)
        return counted.detach()

    def _forward(self, users: Users, losses: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Losses with their graph, and the factor that clips each user's gradient; no number where there is none."""
        unused = {parameter: torch.zeros(len(users)).to(parameter) for parameter in self._optimizer.params}
        for parameter, zeros in unused.items():
            parameter._norm_sample = zeros
        with _recording(self._hooked):
            counted = one_per_user(losses(users), users)
            counted.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]

        def most_uses(layer: nn.Module, parameter: Any) -> float:
            if parameter._norm_sample is unused[parameter]:
                return 0
            return 1 if type(layer) in self._hooked.NORM_SAMPLERS else math.inf

        # The second backward pass gathers all that reaches a parameter; these norms know of one call of its layer.
        _refuse_past_the_layers(self._hooked, counted, most_uses)
        norms = self._hooked.get_norm_sample()
        if len(norms) != len(users):
            raise ValueError(f"expected one gradient norm for each of {len(users)} users, got {len(norms)}")
        coefficients = self._hooked.get_clipping_coef()
        for parameter in unused:
            parameter._norm_sample = None  # private; a pickled module would hold it
        self._optimizer.zero_grad()
        # A norm that overflows gives the factor 0, and zero times infinity is no number: such a user must go.
        return counted, torch.where(norms <= LARGEST_NORM, coefficients, torch.nan)


@contextmanager
def _recording(hooked: AbstractGradSampleModule) -> Iterator[None]:
    """Opacus sees what is computed inside and nothing from before: a forward without a backward would upset it."""
    for layer in hooked.modules():
        for left in ("activations", "max_batch_len"):
            vars(layer).pop(left, None)
    for parameter in hooked.parameters():
        parameter._forward_counter = 0
        vars(parameter).pop("_current_grad_sample", None)
    hooked.enable_hooks()
    try:
        yield
    finally:
        hooked.disable_hooks()


def _refuse_past_the_layers(
    hooked: AbstractGradSampleModule, losses: Tensor, most_uses: Callable[[nn.Module, Any], float]
) -> None:
    """Raise RefusedError where ``losses`` use a layer's parameter more often than Opacus' hooks have seen."""
    uses = _uses(losses)
    for name, layer in hooked._module.named_modules():
        for key, parameter in layer.named_parameters(recurse=False):
            if uses[parameter] and uses[parameter] > most_uses(layer, parameter):
                raise RefusedError(
                    f"parameter '{name}.{key}' got a gradient past its layer, which clipping would miss. Call the layer"
                    " instead of using its parameter, and give an output layer a weight of its own."
                )


def _uses(losses: Tensor) -> Counter[Tensor]:
    """How often each parameter was used on the way to ``losses``."""
    uses: Counter[Tensor] = Counter()
    pending: list[Any] = [losses.grad_fn]
    seen = set(pending)
    while pending:
        for following, _ in pending.pop().next_functions:
            if hasattr(following, "variable"):
                uses[following.variable] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return uses


class _SecretNoise(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """Noise from :class:`Chance` in place of torch's generator, and none on padding."""

    chance: Chance
    padded: list[nn.Embedding]

    def add_noise(self) -> None:
        for parameter in self.params:
            noise = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            self.chance.fill_normal(noise, stddev=self.noise_multiplier * self.max_grad_norm)
            parameter.grad = noise.add_(parameter.summed_grad)
            _mark_as_processed(parameter.summed_grad)
        for layer in self.padded:
            assert layer.weight.grad is not None
            layer.weight.grad[layer.padding_idx] = 0.0


class _HooksOptimizer(_SecretNoise, DPOptimizer):  # type: ignore[misc]
    pass


class _GhostOptimizer(_SecretNoise, DPOptimizerFastGradientClipping):  # type: ignore[misc]
    pass


def _padded_embeddings(module: nn.Module) -> list[nn.Embedding]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Embedding) and layer.padding_idx is not None]


@register_grad_sampler(SparseBag)  # type: ignore[untyped-decorator]
def _bag_gradients(layer: SparseBag, activations: list[Tensor], gradient: Tensor) -> Formed:
    items, weights, starts = activations
    users = users_of(starts, len(items))
    formed = gradient.new_zeros(len(starts), *layer.weight.shape)
    formed.index_put_((users, items), gradient[users] * weights[:, None], accumulate=True)
    return {layer.weight: formed, layer.bias: gradient}


@register_norm_sampler(SparseBag)  # type: ignore[untyped-decorator]
def _bag_norms(layer: SparseBag, activations: list[Tensor], gradient: Tensor) -> Formed:
    items, weights, starts = activations
    users = users_of(starts, len(items))
    if bool(((items[1:] <= items[:-1]) & (users[1:] == users[:-1])).any()):
        raise RefusedError("a bag's items are not strictly increasing. Sort them and add up the weights of equal ones.")
    squares = weights.new_zeros(len(starts)).index_add_(0, users, weights.square())
    norms = _norms(gradient)
    return {layer.weight: (norms * squares.sqrt()).to(gradient), layer.bias: norms.to(gradient)}


@register_grad_sampler(ScaledBiasLinear)  # type: ignore[untyped-decorator]
def _scaled_gradients(layer: ScaledBiasLinear, activations: list[Tensor], gradient: Tensor) -> Formed:
    formed = {layer.weight: torch.einsum("n...o,n...i->noi", gradient, activations[0])}
    if layer.bias is not None:
        formed[layer.bias] = torch.einsum("n...o->no", gradient) * layer.bias_scale
    return formed


# In place of Opacus' sampler of nn.Linear, which leaves out inputs of four dimensions, and whose products of two places
# lose the norm of places that cancel.
@register_norm_sampler(nn.Linear)  # type: ignore[untyped-decorator]
@register_norm_sampler(ScaledBiasLinear)  # type: ignore[untyped-decorator]
def _linear_norms(layer: nn.Linear, activations: list[Tensor], gradient: Tensor) -> Formed:
    inputs, ours = _norms(activations[0]), _norms(gradient)
    inputs = inputs.masked_fill(inputs > 1e25, torch.inf)  # a clipped loss's gradient would lose its digits beside it
    bias_scale = getattr(layer, "bias_scale", 1.0)
    weight, bias = inputs * ours, ours * bias_scale
    if gradient.dim() > 2:
        # The sum is not made of these norms' gradients, and rounds otherwise: no norm counts as less than that.
        rounding = math.sqrt(4000 * torch.finfo(gradient.dtype).eps)
        weight, bias = (rounding * norms.flatten(1).sum(1) for norms in (weight, bias))
        weight = torch.einsum("n...o,n...i->noi", gradient, activations[0]).flatten(1).norm(dim=1).maximum(weight)
        bias = (torch.einsum("n...o->no", gradient).norm(dim=1) * bias_scale).maximum(bias)
    formed: Formed = {layer.weight: weight.to(gradient)}
    return formed if layer.bias is None else formed | {layer.bias: bias.to(gradient)}


def _norms(values: Tensor) -> Tensor:
    """Over the last dimension, in float64: the squares of small numbers vanish in float32."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return norms


@register_grad_sampler(nn.LayerNorm)  # type: ignore[untyped-decorator]  # Opacus' own needs a bias
def _layer_norm_gradients(layer: nn.LayerNorm, activations: list[Tensor], gradient: Tensor) -> Formed:
    normal = F.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
    shape = (len(gradient), -1, *layer.normalized_shape)
    formed: Formed = {layer.weight: (normal * gradient).reshape(shape).sum(1)}
    return formed if layer.bias is None else formed | {layer.bias: gradient.reshape(shape).sum(1)}


@register_grad_sampler(GRU)  # type: ignore[untyped-decorator]
def _gru_gradients(layer: GRU, activations: list[Tensor], gradient: Tensor) -> Formed:
    rule = GRURule("", layer)
    rule.pull_back(rule.compute(activations[0])[1], gradient, wanted=False)
    return rule.formed()
