"""Choose how much synthetic users may count, so that augmentation does not hurt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import Recommender
from shared.recommenders.tuning import OutOfFold, out_of_fold

FloatArray = npt.NDArray[np.float64]

_HOPELESS, _PLENTY = 5_000.0, 100_000.0


class Regime(NamedTuple):
    """What the size of a federation and its promise allow one to hope for."""

    name: str
    sentence: str


def signal(users_times_epsilon: float, num_owners: int) -> float:
    """Users × ε ÷ √owners: what tells how much survives the noise.

    The thresholds of :func:`regime` were measured with one noise for the whole federation. With ``noise = "local"``
    every owner adds all of it, and the average of ``num_owners`` such noises is √owners times the one.
    """
    return users_times_epsilon / math.sqrt(num_owners)


def regime(users_times_epsilon: float, num_owners: int) -> Regime:
    """What to expect of private augmentation, from public numbers alone.

    Args:
        users_times_epsilon: users of the whole federation × ε.
        num_owners: that each add the noise their own promise needs.
    """
    if math.isinf(users_times_epsilon):
        return Regime(
            "no privacy", "ε is infinite: this is a run without privacy, which shows the most a generator can bring."
        )
    found = signal(users_times_epsilon, num_owners)
    size = (
        f"Users × ε = {users_times_epsilon:,.0f}. Each of the {num_owners} owners adds all its noise itself, which"
        f" leaves {found:,.0f} of that (÷ √{num_owners})."
    )
    caveat = (
        "This rule of thumb was read off one data set, MovieLens-1M, and a one-shot release; sparser data needed about"
        " five times more, and a generator trained step by step, as here, hardly less."
    )
    if found < _HOPELESS:
        return Regime(
            "noise wins",
            f"{size} Below {_HOPELESS:,.0f} expect no gain from the federation: the noise that protects users hides"
            f" what they have in common. More users or a larger ε would change that. {caveat}",
        )
    if found < _PLENTY:
        return Regime(
            "some signal",
            f"{size} Between {_HOPELESS:,.0f} and {_PLENTY:,.0f} expect little: owners with few users may gain a part"
            f" of what pooling all data would bring, and weight 0 is often the right choice. {caveat}",
        )
    return Regime(
        "plenty of signal",
        f"{size} Above {_PLENTY:,.0f} expect a good part of what the generator brings without privacy. {caveat}",
    )


def default_weight(users_times_epsilon: float, num_owners: int) -> float:
    """The weight to start from, given public numbers only: none, a tenth or three tenths of the real mass."""
    found = signal(users_times_epsilon, num_owners)
    if found < _HOPELESS:
        return 0.0
    return 0.1 if found < _PLENTY else 0.3


@dataclass(frozen=True, slots=True, eq=False)
class WeightChoice:
    """The weight that was chosen, and why.

    Args:
        weight: synthetic ÷ real training mass.
        recommender: the variant to train at that weight.
        local: the variant to train on real users alone.
        out_of_fold: mean metric by weight, each at its own best variant.
    """

    weight: float
    recommender: Recommender
    local: Recommender
    out_of_fold: dict[float, float]


def choose_weight(
    recommender: Recommender,
    train: Histories,
    synthetic: Histories,
    *,
    weights: Sequence[float],
    default: float,
    plan: OutOfFold,
) -> WeightChoice:
    """Choose among ``weights`` by scores of training users that the scored model has not seen.

    A weight is *trusted* if it beats weight zero by more than one standard error of the per-user differences. No
    trusted weight: zero. The default is kept if it is trusted, unless the best trusted weight beats it by more than one
    standard error too; failing that, the best trusted weight is taken. Every weight is tuned with equal effort.

    Args:
        weights: grid that contains 0; ``default`` is added to it.
        default: weight expected from public numbers, see :func:`default_weight`.
    Guarantee:
        A weight above zero has beaten zero on unseen users, by a margin that a weight which changes nothing reaches
        one time in six.
    """
    if 0 not in weights:
        raise InputError(f"weights {tuple(weights)} lack 0. Add it, so that augmentation can be declined.")
    variants = recommender.variants()
    scores: dict[float, FloatArray] = {}
    chosen: dict[float, Recommender] = {}
    for weight in sorted({0.0, float(default), *map(float, weights)}):
        table = out_of_fold(variants, train, plan, synthetic=synthetic if weight else None, weight=weight)
        best = int(table.mean(axis=1).argmax())
        scores[weight], chosen[weight] = table[best], variants[best]
    weight = pick_weight(scores, default=float(default))
    return WeightChoice(weight, chosen[weight], chosen[0.0], {w: float(row.mean()) for w, row in scores.items()})


def pick_weight(scores: dict[float, FloatArray], *, default: float) -> float:
    """The rule of :func:`choose_weight`, from the per-user scores of each weight."""
    trusted = [weight for weight in scores if weight > 0 and _beats(scores[weight], scores[0.0])]
    if not trusted:
        return 0.0
    best = max(trusted, key=lambda weight: float(scores[weight].mean()))
    if default in trusted and not _beats(scores[best], scores[default]):
        return default
    return best


def _beats(challenger: FloatArray, incumbent: FloatArray) -> bool:
    difference = challenger - incumbent
    if len(difference) < 2:
        return False
    return bool(difference.mean() > difference.std(ddof=1) / np.sqrt(len(difference)))
