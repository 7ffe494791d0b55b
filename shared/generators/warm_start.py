"""First weights of generators that are trained on users, from statistics that were released before."""

import numpy as np
import numpy.typing as npt

from shared.dpsgd.layers import ScaledBiasLinear
from shared.errors import InputError
from shared.generators.base import Spec, Weights
from shared.generators.family import build_model, initial_weights
from shared.generators.multvae import VaeSpec
from shared.generators.spectral import SpectralSpec, fit_spectral
from shared.sketch.release import Sketch

Floats = npt.NDArray[np.float64]

# What tanh is given of a latent of size 1: it bends only where a user is odd, and its slope is 0.92 at 1.
_NEARLY_LINEAR = 0.3


def warm_start_popularity(sketch: Sketch, spec: Spec, *, seed: int) -> Weights:
    """Weights from chance, but for the bias of the items: the logarithm of their popularity.

    Args:
        seed: of all other weights, which are those of :func:`shared.generators.family.initial_weights`.
    Guarantee:
        Post-processing of the releases behind ``sketch``.
    Raises:
        InputError: the sketch is of another catalogue, or the kind has no bias of items that popularity scales.
    """
    _check_catalogue(sketch, spec)
    weights = initial_weights(spec, seed)
    biases = {
        f"{name}.bias": layer.bias_scale
        for name, layer in build_model(spec).named_modules()
        if isinstance(layer, ScaledBiasLinear) and layer.out_features == spec.num_items
    }
    if not biases:
        raise InputError(f"a generator of kind {spec.kind} has no bias of items to start; use warm_start none.")
    for name, scale in biases.items():
        weights[name] = _unscaled(np.log(sketch.popularity), scale)
    return weights


def warm_start_vae(sketch: Sketch, spec: VaeSpec, *, seed: int) -> Weights:
    """Weights of a VAE that is about the spectral generator of ``sketch``, and encodes users accordingly.

    The decoder's output layer holds the spectral item vectors ``F`` and biases ``b``, with the latent turned so that
    ``Σ_i p_i (F_i - F̄)(F_i - F̄)ᵀ`` is diagonal with entries ``v``. The encoder is then one step of Newton towards the
    most likely latent of a user of ``n`` items: variance ``1 / (1 + n v)`` and mean ``Σ_i (F_i - F̄)`` times that, with
    one typical ``n``, since the encoder is linear in ``x / √n``. The prior is about standard normal. Hidden units and
    latents that ``F`` does not fill have no effect yet, but get a gradient.

    Args:
        seed: of :func:`fit_spectral`, and of the weights that the sketch says nothing about.
    Guarantee:
        Post-processing of the releases behind ``sketch``.
    Raises:
        InputError: the sketch is of another catalogue.
    """
    _check_catalogue(sketch, spec)
    size = min(spec.hidden_size, spec.latent_size)
    spectral = fit_spectral(sketch, SpectralSpec(num_items=spec.num_items, latent_size=size), seed=seed)
    centred, vectors, spread = _turned(spectral["to_logits.weight"].astype(np.float64), sketch.popularity)
    typical = float(np.exp(sketch.length_shares @ np.log(sketch.length_edges)))
    variances = 1.0 / (1.0 + typical * spread)

    weights = initial_weights(spec, seed)
    # A user shows x / √n to the encoder, and Newton's step is for x.
    weights["encoder.weight"][:, :size] = _NEARLY_LINEAR * np.sqrt(typical) * centred * variances
    for name, scale in (("to_mean", 1.0 / _NEARLY_LINEAR), ("decoder", _NEARLY_LINEAR)):
        found = weights[f"{name}.weight"]
        found[:size] = 0.0
        found[np.arange(size), np.arange(size)] = scale
        if name == "to_mean":
            found[size:] = 0.0
    weights["to_log_variance.weight"][:] = 0.0
    weights["to_log_variance.bias"][:size] = np.log(variances)
    weights["to_logits.weight"][:] = 0.0
    weights["to_logits.weight"][:, :size] = vectors / _NEARLY_LINEAR
    weights["to_logits.bias"] = _unscaled(spectral["to_logits.bias"], spec.popularity_scale)
    if spec.prior == "mixture":
        # Half of the variance lies between components, half within: together a variance of 1 at the start.
        weights["prior_means.values.weight"] *= np.float32(np.sqrt(0.5))
        weights["prior_log_variances.values.weight"][:] = np.log(0.5)
    return weights


def _turned(vectors: Floats, popularity: Floats) -> tuple[Floats, Floats, Floats]:
    """Centred and raw vectors in axes where the centred ones are uncorrelated, and their variances there."""
    centred = vectors - popularity @ vectors
    spread, axes = np.linalg.eigh((centred * popularity[:, None]).T @ centred)
    return centred @ axes, vectors @ axes, np.maximum(spread, 0.0)


def _unscaled(bias: npt.NDArray[np.floating], scale: float) -> npt.NDArray[np.float32]:
    # The layer multiplies its bias by the scale; a scale of 0 is a generator without popularity.
    centred = bias - bias.mean()
    return (centred / scale if scale else np.zeros_like(bias)).astype(np.float32)


def _check_catalogue(sketch: Sketch, spec: Spec) -> None:
    if len(sketch.popularity) != spec.num_items:
        raise InputError(
            f"the sketch is of {len(sketch.popularity)} items, the generator of {spec.num_items}. Use one catalogue."
        )
