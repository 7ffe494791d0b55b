"""The least noise that a target epsilon allows, at a cap on batches that costs nothing."""

import math
from collections.abc import Callable, Mapping, Sequence

from scipy import stats

from shared.errors import InputError
from shared.privacy.accounting import epsilon
from shared.privacy.releases import DpSgdRelease, GaussianRelease, Release

_LARGEST = 4096.0

# Were every step under a tight cap lost altogether, this part of delta would be gone.
_TIGHT_SHARE = 1e-3


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    num_steps: int,
    max_users: int,
    max_batch: int | None = None,
    beside: Sequence[Release] = (),
) -> DpSgdRelease:
    """All steps of a run as one release whose price is at most ``target_epsilon``.

    Args:
        beside: what the run releases besides, priced together with it.

    The noise multiplier is found by bisection on the accountant itself and rounded up to four
    significant digits, so that the number printed is the number used.

    Raises:
        InputError: the target is not a finite number above 0, or no reasonable noise reaches it.
    """
    _check_target(target_epsilon)

    def release(noise_multiplier: float, cap: int | None) -> DpSgdRelease:
        return DpSgdRelease(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            num_steps=num_steps,
            max_users=max_users,
            max_batch=cap,
        )

    def least(low: float, high: float, step: float, cap: int | None) -> float:
        def fits(noise: float) -> bool:
            return epsilon([*beside, release(noise, cap)], delta) <= target_epsilon

        found = _least_noise(fits, low, high, step)
        if found is None:
            raise InputError(
                f"epsilon={target_epsilon:g} at delta={delta:g} over {num_steps} steps at sample_rate {sample_rate:g}"
                f"{f' and max_batch {cap}' if cap else ''}{' beside the sketch' if beside else ''} would need a noise"
                f" multiplier above {_LARGEST:g}. Ask for fewer steps{', a larger max_batch' if cap else ''}"
                f"{', a smaller privacy.sketch_share' if beside else ''} or a larger epsilon."
            )
        return found

    noise = least(0.0, 1.0, 1.0, None)
    if max_batch is not None:
        # A cap only adds to the price: the noise without one is where to start, and most often where to stay.
        noise = least(noise, noise, 1e-3 * noise, max_batch)
    return release(noise, max_batch)


def calibrate_statistics(
    relative_noise: Mapping[str, float], *, target_epsilon: float, delta: float, max_users: int
) -> tuple[GaussianRelease, ...]:
    """One Gaussian release for each statistic, which cost at most ``target_epsilon`` together.

    Args:
        relative_noise: by statistic, its noise multiplier as a multiple of a common one, which is found.
    Raises:
        InputError: the target is not a finite number above 0, or no reasonable noise reaches it.
    """
    _check_target(target_epsilon)

    def releases(noise: float) -> tuple[GaussianRelease, ...]:
        return tuple(
            GaussianRelease(statistic=name, noise_multiplier=_round_up(noise * times), max_users=max_users)
            for name, times in relative_noise.items()
        )

    found = _least_noise(lambda noise: epsilon(releases(noise), delta) <= target_epsilon, 0.0, 1.0, 1.0)
    if found is None:
        raise InputError(
            f"epsilon={target_epsilon:g} at delta={delta:g} for the sketch would need a noise multiplier above"
            f" {_LARGEST:g}. Ask for a larger epsilon or privacy.sketch_share."
        )
    return releases(found)


def _least_noise(fits: Callable[[float], bool], low: float, high: float, step: float) -> float | None:
    """The least noise that fits, rounded up to four digits, from ``low``, which does not; None above the largest."""
    while not fits(high):
        low, high, step = high, high + step, 2 * step
        if high > _LARGEST:
            return None
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        # Below a tenth of the clip there is no privacy worth computing, and the accountant is slow.
        if middle < 0.1 or fits(middle):
            high = middle
            if high <= 0.1:
                break
        else:
            low = middle
    return _round_up(max(high, 0.1))


def _check_target(target_epsilon: float) -> None:
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise InputError(
            f"privacy.epsilon must be finite and greater than 0 to calibrate noise, not {target_epsilon!r}."
        )


def default_max_batch(*, max_users: int, sample_rate: float, num_steps: int, delta: float) -> int:
    """The smallest cap that a whole run exceeds so improbably that it does not move epsilon; public numbers only.

    Guarantee:
        The cap binds with a chance of at most ``delta / 1000`` in the whole run. This adds less than 0.001 to an
        epsilon of up to 10; measured, 2e-5 at most.
    """
    improbable = _TIGHT_SHARE * delta / num_steps
    # The accountant counts a step as tight where at least max_batch of the other users are drawn.
    return min(max_users, 1 + int(stats.binom.isf(improbable, max_users - 1, sample_rate)))


def _round_up(value: float) -> float:
    scale: float = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
