"""The errors that users see, each with the exit code the command line returns for it."""


class FedAugError(Exception):
    """Base of every message meant for a user: what happened, with numbers, and what to do next."""

    exit_code = 1


class InputError(FedAugError):
    """A file, a flag or a scenario cannot be used as given."""

    exit_code = 2


class LeakError(FedAugError):
    """Held-out data would reach training; raised by the guards, never caught."""


class RefusedError(FedAugError):
    """The owner's policy or budget says no."""

    exit_code = 3


class BudgetExceeded(RefusedError):
    """A release would cost more epsilon than was promised."""
