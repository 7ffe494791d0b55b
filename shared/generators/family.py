"""All kinds of generator, by name."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from shared.errors import InputError
from shared.generators.base import GeneratorModel, Spec, Weights, initial_weights_of, load_weights
from shared.generators.gan import Gan, GanSpec
from shared.generators.multvae import MultVAE, VaeSpec
from shared.generators.sequence import SequenceModel, SequenceSpec
from shared.generators.spectral import Spectral, SpectralSpec

GeneratorSpec = Spec

_KINDS: dict[str, tuple[type[Spec], type[GeneratorModel]]] = {
    "vae": (VaeSpec, MultVAE),
    "gan": (GanSpec, Gan),
    "sequence": (SequenceSpec, SequenceModel),
    "spectral": (SpectralSpec, Spectral),
}
KINDS = tuple(_KINDS)
# Before the first round every owner's home weights are the same, and known to everyone.
_HOME_SEED = 0


def spec_from_dict(values: Mapping[str, Any]) -> Spec:
    """Read ``to_dict``'s form of whichever spec it is.

    Raises:
        InputError: the kind is unknown, or a field is unknown, missing or out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"generator spec: fields by name are needed, not {type(values).__name__}")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"generator spec: unknown kind {kind!r:.80}; this version knows {', '.join(KINDS)}.")
    return _KINDS[kind][0].from_dict(values)


def build_model(spec: Spec) -> GeneratorModel:
    """A model of ``spec`` whose weights are of no use yet."""
    return _KINDS[spec.kind][1](spec)


def initial_weights(spec: Spec, seed: int) -> Weights:
    """Weights before training, from ``seed`` and public sizes alone: float32, in a fixed order."""
    return initial_weights_of(build_model(spec), seed)


def model_from(spec: Spec, weights: Weights) -> GeneratorModel:
    """A model with ``weights``.

    Raises:
        InputError: names or shapes are not those of ``spec``, or a number is not finite.
    """
    model = build_model(spec)
    load_weights(model, weights)
    return model


def with_home_weights(spec: Spec, weights: Weights) -> Weights:
    """``weights`` and, of those that owners keep, the ones missing as every owner begins with them; in their order."""
    missing = [name for name in weight_shapes(spec) if name not in weights and name not in travelling_shapes(spec)]
    if not missing:
        return weights
    first = initial_weights(spec, _HOME_SEED)
    return {
        name: first[name] if name in missing else weights[name]
        for name in weight_shapes(spec)
        if name in weights or name in missing
    }


@lru_cache(maxsize=16)
def weight_shapes(spec: Spec) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a generator's weights, in their order; nothing of their size is allocated."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(spec).state_dict().items()}


@lru_cache(maxsize=16)
def travelling_shapes(spec: Spec) -> Mapping[str, tuple[int, ...]]:
    """:func:`weight_shapes` of what is sent and averaged: without the weights that every owner keeps."""
    with torch.device("meta"):
        model = build_model(spec)
    return {name: shape for name, shape in weight_shapes(spec).items() if not model.stays_home(name)}
