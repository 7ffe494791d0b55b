"""What every recommender must be able to do, whatever it is made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from shared.config import RecommenderSection
from shared.data.histories import Histories
from shared.devices import choose_device
from shared.errors import InputError
from shared.rng import torch_stream


class Fitted(Protocol):
    """A trained recommender."""

    def scores(self, fold_in: Histories) -> npt.NDArray[np.float32]:
        """Scores of the whole catalogue, shape ``(num_users, num_items)``, for any users, also unseen ones."""
        ...


Schedule = Literal["constant", "fade"]
"""What synthetic users count in the course of training: all the same, or fully at first and ever less, down to nothing.

``fade`` is a curriculum of two data sets without a seam: pre-training on synthetic users, and real ones at the end.
"""


class Recommender(Protocol):
    """A recommender with its settings, not yet trained."""

    @property
    def name(self) -> str: ...

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Those that :meth:`fit` knows; ``constant`` is the first."""
        ...

    def variants(self) -> tuple[Self, ...]:
        """The same recommender at each setting that out-of-fold tuning may choose from."""
        ...

    def fit(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> Fitted:
        """Train on ``real`` users and, with total mass ``weight`` times theirs, on ``synthetic`` ones.

        Args:
            weight: synthetic ÷ real training mass, counted in interactions, where training begins; 0 leaves
                ``synthetic`` unread.
            schedule: what becomes of the weight later, one of :attr:`schedules`.
        Guarantee:
            Neither input is changed, and one seed gives one model.
        """
        ...

    def fit_variants(
        self,
        real: Histories,
        synthetic: Histories | None = None,
        *,
        weight: float = 0.0,
        schedule: Schedule = "constant",
        seed: int,
    ) -> Iterator[Fitted]:
        """A model of every one of :meth:`variants`, in that order, the same as its own :meth:`fit` would give.

        Variants that differ in when their training stops are models that one training passes on its way.
        """
        ...


def synthetic_user_weight(real: Histories, synthetic: Histories | None, weight: float) -> float:
    """What one synthetic user counts, if a real one counts 1, so that the masses stand at ``weight``.

    Raises:
        InputError: the weight is negative or not finite, or there is nothing to give it to.
    """
    if not np.isfinite(weight) or weight < 0:
        raise InputError(f"weight {weight} is not a mass ratio; it must be 0 or more.")
    if weight == 0:
        return 0.0
    if synthetic is None or synthetic.num_interactions == 0:
        raise InputError(f"weight {weight:g} asks for synthetic users, and there are none. Synthesise some or use 0.")
    if synthetic.num_items != real.num_items:
        raise InputError(
            f"synthetic users live in a catalogue of {synthetic.num_items} items, real ones in {real.num_items}."
            " Synthesise from a generator of this catalogue."
        )
    return weight * real.num_interactions / synthetic.num_interactions


@contextmanager
def own_chance(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside, since dropout takes no other, and put them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch_stream(seed, name).initial_seed())
        yield


def build_recommender(section: RecommenderSection, num_items: int) -> Recommender:
    """The recommender that a scenario asks for.

    Raises:
        InputError: the device it names is absent.
    """
    # Imported here because each of them imports this module, and because SASRec's library takes seconds to load.
    device = choose_device(section.device, key="recommender.device")
    if section.kind == "ease":
        if section.device != "auto" and device.type != "cpu":
            raise InputError(
                f"recommender.device={section.device!r}: EASE is solved on the CPU. Use recommender.device=auto, or"
                " recommender.kind=multvae or sasrec."
            )
        from shared.recommenders.ease import Ease

        return Ease(section.l2)
    if section.kind == "multvae":
        from shared.recommenders.multvae import MultVae

        return MultVae(
            num_items, section.hidden_size, epochs=section.epochs, learning_rate=section.learning_rate, device=device
        )
    from shared.recommenders.sasrec import SasRec

    return SasRec(
        num_items, section.hidden_size, epochs=section.epochs, learning_rate=section.learning_rate, device=device
    )
