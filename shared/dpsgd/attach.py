"""Find the book-keeping rule of every layer of a model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shared.dpsgd.rules import RULES, Rule
from shared.errors import RefusedError

_INSTEAD: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "Write attention as torch.nn.Linear and scaled_dot_product_attention(is_causal=True).",
    nn.GRU: "Use shared.dpsgd.layers.GRU.",
    nn.LSTM: "Use shared.dpsgd.layers.GRU.",
    nn.RNN: "Use shared.dpsgd.layers.GRU.",
    nn.EmbeddingBag: "Use shared.dpsgd.layers.SparseBag, whose items are distinct within a user.",
}
# What the layers that have a rule call their parameters.
_PARAMETERS = {"weight", "bias", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}


def attach(module: nn.Module) -> list[Rule]:
    """The rules of ``module``'s layers, which watch it inside :func:`watching` and leave it alone outside.

    Raises:
        RefusedError: a layer cannot be clipped by user exactly; the message says what to use instead.
    """
    refuse_mixed_users(module)
    rules: list[Rule] = []
    owners: list[tuple[int, int, str]] = []
    for name, layer in module.named_modules():
        own = [(f"{name}.{key}", p) for key, p in layer.named_parameters(recurse=False, remove_duplicate=False)]
        for key, parameter in own:
            first, last = _memory(parameter)
            for begin, end, owner in owners:
                if first < end and begin < last:
                    raise RefusedError(
                        f"parameters {owner!r} and {key!r} are one, or overlap: the norm of the sum of their gradients"
                        " would be missed. Give each layer parameters of its own."
                    )
            owners.append((first, last, key))
        trained = [parameter.requires_grad for _, parameter in own]
        if not any(trained):
            continue
        reshaped = any(key.rpartition(".")[2] not in _PARAMETERS for key, _ in own)  # by weight_norm and its like
        if type(layer) not in RULES or reshaped or not all(trained):
            supported = ", ".join(kind.__name__ for kind in RULES)
            why = "no book-keeping rule"
            instead = _INSTEAD.get(type(layer), f"Build it from {supported}, or choose the engine 'hooks'.")
            if type(layer) in RULES and not all(trained):
                why, instead = "some of its parameters frozen and some not", "Freeze all of them or none."
            raise RefusedError(
                f"layer {name!r} ({type(layer).__name__}) with {', '.join(repr(key) for key, _ in own)} has {why}."
                f" {instead}"
            )
        rules.append(RULES[type(layer)](name, layer))
    return rules


def refuse_mixed_users(module: nn.Module) -> None:
    """Raise RefusedError where a layer computes over the batch, or remembers it."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) or getattr(layer, "running_mean", None) is not None:
            raise RefusedError(
                f"layer {name!r} ({type(layer).__name__}) mixes the users of a batch or keeps running statistics of"
                " them, which clipping does not bound. Use torch.nn.LayerNorm."
            )
        if getattr(layer, "max_norm", None) is not None or getattr(layer, "scale_grad_by_freq", False):
            raise RefusedError(
                f"layer {name!r} ({type(layer).__name__}) rescales the weights or gradients of the items that occur in"
                " a batch, which clipping does not bound. Leave out max_norm and scale_grad_by_freq."
            )


@contextmanager
def watching(rules: list[Rule]) -> Iterator[None]:
    """Let each rule stand in for its layer's forward; only what is computed inside is clipped and summed."""
    with ExitStack() as stack:
        for rule in rules:
            rule.clear()
            rule.module.forward = rule
            stack.callback(delattr, rule.module, "forward")
            for key, parameter in rule.module.named_parameters(recurse=False):
                refuse = partial(_refuse_past_the_layer, f"{rule.name}.{key}")
                stack.callback(parameter.register_hook(refuse).remove)  # type: ignore[no-untyped-call]
        yield


def _refuse_past_the_layer(key: str, gradient: Tensor | None) -> None:
    """What autograd calls with the gradient of a parameter: none, as long as only its layer uses it."""
    if gradient is not None:
        raise RefusedError(
            f"parameter {key!r} got a gradient past its layer, which clipping would miss. Call the layer instead of"
            " using its parameter, and give an output layer a weight of its own."
        )


def _memory(parameter: Tensor) -> tuple[int, int]:
    """First and one past the last address of ``parameter``'s numbers."""
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if parameter.numel() else 0
    return parameter.data_ptr(), parameter.data_ptr() + span * parameter.element_size()
