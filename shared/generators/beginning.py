"""Begin a generator from what owners released before its training."""

from shared.generators.base import Weights
from shared.generators.family import GeneratorSpec
from shared.generators.multvae import VaeSpec
from shared.generators.spectral import SpectralSpec, fit_spectral
from shared.generators.warm_start import warm_start_popularity, warm_start_vae
from shared.sketch.release import Sketch


def begin_from(sketch: Sketch, spec: GeneratorSpec, *, seed: int) -> Weights:
    """Weights to begin with: post-processing of the releases behind ``sketch``, a function of them and of ``seed``.

    A spectral generator is complete with that. A VAE knows which items go together, where that was released; other
    kinds know how popular items are.
    """
    if isinstance(spec, SpectralSpec):
        return fit_spectral(sketch, spec, seed=seed)
    if isinstance(spec, VaeSpec) and sketch.rank:
        return warm_start_vae(sketch, spec, seed=seed)
    return warm_start_popularity(sketch, spec, seed=seed)
