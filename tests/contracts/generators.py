"""A small generator of every kind."""

from shared.generators.base import Spec
from shared.generators.multvae import VaeSpec

NUM_ITEMS = 30

SPECS: dict[str, Spec] = {
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
}
