"""An owner's histories as training may see them: without those who opted out."""

import hashlib
from pathlib import Path

import numpy as np

from client.policy import Policy
from shared.data.histories import Histories
from shared.errors import InputError, RefusedError

HISTORIES, USER_IDS = "train.npz", "users.txt"


def training_histories(directory: Path, policy: Policy, *, num_items: int) -> Histories:
    """``directory/train.npz`` without the users whom ``policy.opt_out`` lists, and the newest items of the others.

    Who is on the list is left out before anything is counted or compared, so nothing that happens later depends on
    them. Leaving a user out is a change by one user, which the guarantee covers.

    Args:
        num_items: of the catalogue that the generator is over.
    Raises:
        InputError: a file is missing or does not fit, or the catalogue is another.
        RefusedError: the owner has more users than its policy declares.
    """
    histories = Histories.load(directory / HISTORIES)
    if policy.opt_out is not None:
        histories = histories.select(~_opted_out(directory, policy.opt_out, histories.num_users))
    histories = histories.newest(policy.max_items_per_user)
    if histories.num_items != num_items:
        raise InputError(
            f"the histories in {directory} are over {histories.num_items} items, the generator has {num_items}: index"
            " them again with the catalogue of this run."
        )
    if histories.num_users > policy.max_users:
        raise RefusedError(
            f"{directory} holds more users than max_users={policy.max_users} of its own policy: raise it there, tell"
            " the server, and start a new run."
        )
    return histories


def digest_of(histories: Histories) -> bytes:
    """SHA-256 of what is trained on."""
    content = hashlib.sha256()
    for values in (histories.indptr, histories.items, histories.timestamps, histories.behaviours):
        if values is not None:
            content.update(np.ascontiguousarray(values).tobytes())
    return content.digest()


def _opted_out(directory: Path, name: str, num_users: int) -> np.ndarray:
    listed = set(_lines(directory / name, why="nothing is trained without the list that the policy names"))
    ids = _lines(directory / USER_IDS, why="an opt-out needs the id of every user, one a line in the data's order")
    if len(ids) != num_users:
        raise InputError(f"{directory / USER_IDS} does not name each user of {HISTORIES} once: prepare both again.")
    return np.array([user in listed for user in ids], dtype=bool)


def _lines(path: Path, *, why: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}): {why}.") from None
