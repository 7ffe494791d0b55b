"""A small generator of every kind, in all its forms."""

from dataclasses import replace

from shared.generators.base import Spec
from shared.generators.gan import GanSpec
from shared.generators.multvae import VaeSpec
from shared.generators.sequence import SequenceSpec
from shared.generators.spectral import SpectralSpec

NUM_ITEMS = 30

_ONE_OF_EACH: dict[str, Spec] = {
    "vae": VaeSpec(
        num_items=NUM_ITEMS,
        hidden_size=8,
        latent_size=3,
        prior="mixture",
        num_components=2,
        kl_weight=0.2,
        kl_anneal_share=0.5,
        dropout=0.3,
        popularity_scale=2.0,
    ),
    "gan": GanSpec(
        num_items=NUM_ITEMS,
        hidden_size=8,
        latent_size=3,
        discriminator_size=6,
        loss="bce",
        weight_clip=0.1,
        fakes=5,
        generator_steps=2,
        generator_rate_share=1.0,
        items_shown=4,
        popularity_scale=2.0,
        input_scale=1.0,
        discriminators="aggregated",
    ),
    "sequence": SequenceSpec(
        num_items=NUM_ITEMS,
        num_behaviours=1,
        architecture="gru",
        size=8,
        num_layers=1,
        num_heads=2,
        max_length=6,
        gap_edges=(60, 3600),
        dropout=0.2,
        popularity_scale=2.0,
    ),
    "spectral": SpectralSpec(num_items=NUM_ITEMS, latent_size=3),
}

_VAE, _GAN, _SEQUENCE = (_ONE_OF_EACH[kind] for kind in ("vae", "gan", "sequence"))

SPECS: dict[str, Spec] = {
    **_ONE_OF_EACH,
    "vae with a gaussian prior": replace(_VAE, prior="gaussian"),
    "vae with a flow prior": replace(_VAE, prior="flow"),
    "gan with a hinge": replace(_GAN, loss="hinge"),
    "gan by wasserstein": replace(_GAN, loss="wasserstein"),
    "gan with discriminators at home": replace(_GAN, discriminators="local"),
    "sequence by a transformer": replace(_SEQUENCE, architecture="transformer"),
    "sequence of behaviours": replace(_SEQUENCE, num_behaviours=3),
    "sequence without time": replace(_SEQUENCE, gap_edges=()),
}
