"""Choose where to compute."""

import torch

from shared.errors import InputError


def choose_device(name: str, *, key: str) -> torch.device:
    """``auto`` is CUDA when there is one; a device that is named must exist.

    Args:
        key: that named it, for the message.
    Raises:
        InputError: the device is unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{key}={name!r} is not a device. Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cpu":
        return device
    present = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= present:
        raise InputError(
            f"{key}={name!r} is not on this machine, which has {present} CUDA device(s). Use {key}=auto or cpu."
        )
    return device
