"""What the noise of a release is worth, in the words that cards, ledgers and run records use."""

from typing import Literal

NoiseKind = Literal["local", "seeded, not private", "none, not private"]

LOCAL_NOISE: NoiseKind = "local"
SEEDED_NOISE: NoiseKind = "seeded, not private"
NO_NOISE: NoiseKind = "none, not private"
