"""The least noise that a target epsilon allows."""

import math

from shared.errors import InputError
from shared.privacy.accounting import epsilon
from shared.privacy.releases import DpSgdRelease

_LARGEST = 4096.0


def calibrate(
    *, target_epsilon: float, delta: float, sample_rate: float, num_steps: int, max_users: int
) -> DpSgdRelease:
    """All steps of a run as one release whose price is at most ``target_epsilon``.

    The noise multiplier is found by bisection on the accountant itself and rounded up to four
    significant digits, so that the number printed is the number used.

    Raises:
        InputError: the target is not a finite number above 0, or no reasonable noise reaches it.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise InputError(
            f"privacy.epsilon must be finite and greater than 0 to calibrate noise, not {target_epsilon!r}."
        )

    def release(noise_multiplier: float) -> DpSgdRelease:
        return DpSgdRelease(
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            num_steps=num_steps,
            max_users=max_users,
        )

    low, high = 0.0, 1.0
    while epsilon([release(high)], delta) > target_epsilon:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise InputError(
                f"epsilon={target_epsilon:g} at delta={delta:g} over {num_steps} steps at sample_rate {sample_rate:g}"
                f" would need a noise multiplier above {_LARGEST:g}. Ask for fewer steps or a larger epsilon."
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        # Below a tenth of the clip there is no privacy worth computing, and the accountant is slow.
        if middle < 0.1 or epsilon([release(middle)], delta) <= target_epsilon:
            high = middle
            if high <= 0.1:
                break
        else:
            low = middle
    return release(_round_up(max(high, 0.1)))


def _round_up(value: float) -> float:
    scale: float = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
