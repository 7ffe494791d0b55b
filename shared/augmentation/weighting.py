"""Choose how much synthetic users may count, so that augmentation does not hurt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError
from shared.recommenders.base import Recommender, Schedule
from shared.recommenders.tuning import OutOfFold, out_of_fold
from shared.rng import stream

FloatArray = npt.NDArray[np.float64]

_HOPELESS, _PLENTY = 5_000.0, 100_000.0

_ERROR_RATE = 1 / 6  # what one standard error promises of a single weight
_FLIPS = 2_399  # with the draw itself 2,400, of which a sixth is a whole number
_USERS_AT_ONCE = 1_024


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
        " five times more, and a generator trained step by step hardly less."
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


class Mixing(NamedTuple):
    """How synthetic users count: ``weight`` is synthetic ÷ real training mass where training begins."""

    weight: float
    schedule: Schedule = "constant"


NO_MIXING = Mixing(0.0)


@dataclass(frozen=True, slots=True, eq=False)
class WeightChoice:
    """The weight and the schedule that were chosen, and why.

    Args:
        weight: synthetic ÷ real training mass, where training begins.
        schedule: what becomes of the weight in the course of training.
        recommender: the variant to train so.
        local: the variant to train on real users alone.
        out_of_fold: mean metric by weight and schedule, each at its own best variant.
    """

    weight: float
    schedule: Schedule
    recommender: Recommender
    local: Recommender
    out_of_fold: dict[Mixing, float]


def choose_weight(
    recommender: Recommender,
    train: Histories,
    synthetic: Histories,
    *,
    weights: Sequence[float],
    default: float,
    plan: OutOfFold,
) -> WeightChoice:
    """Choose among ``weights`` and schedules by scores of training users that the scored model has not seen.

    Each weight is tried under each schedule the recommender knows, and tuned with equal effort, early stopping included
    where it is trained in epochs. :func:`pick_mixing` says which one is taken.

    Args:
        train: training users only. There are no other users here to choose by.
        weights: grid that contains 0; ``default`` is added to it.
        default: weight expected from public numbers, see :func:`default_weight`; its schedule is ``constant``.
    Guarantee:
        Where no weight of the whole grid changes anything, one above zero is taken one time in six at most, as exactly
        as :func:`clearly_better` says.
    """
    if 0 not in weights:
        raise InputError(f"weights {tuple(weights)} lack 0. Add it, so that augmentation can be declined.")
    positive = sorted({float(default), *map(float, weights)} - {0.0})
    variants = recommender.variants()
    scores: dict[Mixing, FloatArray] = {}
    chosen: dict[Mixing, Recommender] = {}
    for mixing in (NO_MIXING, *(Mixing(weight, schedule) for weight in positive for schedule in recommender.schedules)):
        table = out_of_fold(
            recommender, train, plan, synthetic=synthetic, weight=mixing.weight, schedule=mixing.schedule
        )
        best = int(table.mean(axis=1).argmax())
        scores[mixing], chosen[mixing] = table[best], variants[best]
    picked = pick_mixing(scores, default=Mixing(float(default)), rng=stream(plan.seed, "mixing", "sign-flips"))
    means = {mixing: float(row.mean()) for mixing, row in scores.items()}
    return WeightChoice(picked.weight, picked.schedule, chosen[picked], chosen[NO_MIXING], means)


def pick_mixing(scores: Mapping[Mixing, FloatArray], *, default: Mixing, rng: np.random.Generator) -> Mixing:
    """The rule of :func:`choose_weight`.

    A mixing is *trusted* if it is clearly better than none, see :func:`clearly_better`. None is trusted: no synthetic
    users. The default is kept if it is trusted, unless others that are trusted are clearly better than it; the best of
    these is taken then, and the best of all trusted ones where the default is not among them.

    Args:
        scores: of the same users in the same order under each mixing, :data:`NO_MIXING` among them.
    Guarantee:
        What is taken has a better mean than no synthetic users; where the default's mean is not better, it is not
        the default, unless that is no synthetic users.
    """
    trusted = clearly_better(scores, than=NO_MIXING, rng=rng)
    if default in trusted:
        above = clearly_better({mixing: scores[mixing] for mixing in trusted}, than=default, rng=rng)
        trusted = above or [default]
    return max(trusted, key=lambda mixing: float(scores[mixing].mean()), default=NO_MIXING)


def clearly_better(scores: Mapping[Mixing, FloatArray], *, than: Mixing, rng: np.random.Generator) -> list[Mixing]:
    """Those whose lead over ``than`` would be seen one time in six at most, had none of them a lead.

    A lead is the sum of the differences by user ÷ the root of the sum of their squares: Student's t but for a
    monotone transform. It is compared with the *greatest* lead of all when each user's differences change their signs
    together at random: many weights have many chances to look good, and what they have in common is kept.

    Guarantee:
        If users are independent, and each one's differences as likely as their opposites, then any is returned one
        time in six at most, however many there are and however alike. For other differences of mean zero the bound is
        approached as users grow.
    Reference:
        Westfall & Young 1993, single-step maxT; Chernozhukov, Chetverikov & Kato 2013, arXiv:1212.6906, for many users.
    """
    others = [mixing for mixing in scores if mixing != than]
    if not others:
        return []
    differences = np.stack([scores[mixing] - scores[than] for mixing in others], axis=1)
    norms = np.sqrt((differences**2).sum(axis=0))
    # Where nobody's score changed, the lead is none.
    differences = differences / np.where(norms > 0, norms, 1.0)
    greatest = _flipped(differences, rng).max(axis=1)
    # The draw itself is one of the equally likely ones. Sums of the same numbers in another order differ by rounding.
    at_least = 1 + (greatest[:, None] >= differences.sum(axis=0) - 1e-9).sum(axis=0)
    return [
        mixing for mixing, count in zip(others, at_least, strict=True) if count <= _ERROR_RATE * (1 + len(greatest))
    ]


def _flipped(differences: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Sums of ``differences`` over users with random signs, shape ``(_FLIPS, num_columns)``."""
    sums = np.zeros((_FLIPS, differences.shape[1]))
    for start in range(0, len(differences), _USERS_AT_ONCE):
        users = differences[start : start + _USERS_AT_ONCE]
        signs = 2.0 * rng.integers(2, size=(_FLIPS, len(users)), dtype=np.int8) - 1.0
        sums += signs @ users
    return sums
