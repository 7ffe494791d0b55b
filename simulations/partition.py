"""Deal the users of one data set to simulated owners."""

import re
import unicodedata
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.data.indexing import IndexedUsers
from shared.errors import InputError

IntArray = npt.NDArray[np.int64]
PartitionKind = Literal["institution", "random", "dirichlet"]

_ACTIVITY_GROUPS = 10
_DIRICHLET_DRAWS = 100
_MIN_OWNER_USERS = 2  # one to train on, one to hold out


def partition_users(
    users: IndexedUsers,
    *,
    kind: PartitionKind,
    num_owners: int,
    users_per_owner: int | None,
    dirichlet_alpha: float,
    rng: np.random.Generator,
) -> dict[str, IntArray]:
    """Positions of each owner's users, ascending, by owner name.

    ``institution``: an owner is an institution of the data; of more than ``num_owners`` the largest stay.
    ``random``: users are dealt at random, to owners of equal size up to one user.
    ``dirichlet``: owners differ in how active their users are. Users are put into ten groups by the length of their
    history, and each group is dealt in proportions drawn from a symmetric Dirichlet distribution (Hsu et al. 2019,
    arXiv:1909.06335, with activity in the place of the label); the smaller ``dirichlet_alpha``, the more they differ.

    Args:
        users_per_owner: with ``random`` exactly so many; otherwise a random choice of at most so many.
    Raises:
        InputError: there are too few users or institutions, or an owner would have fewer than two users.
    """
    if num_owners * _MIN_OWNER_USERS > users.histories.num_users:
        raise InputError(
            f"{users.histories.num_users} users do not suffice for {num_owners} owners with {_MIN_OWNER_USERS} or more"
            " users each. Lower data.num_owners or data.min_interactions."
        )
    if kind == "institution":
        parts = _by_institution(users, num_owners)
    elif kind == "random":
        parts = _at_random(users.histories.num_users, num_owners, users_per_owner, rng)
    else:
        parts = _by_activity(users.histories.lengths(), num_owners, dirichlet_alpha, rng)
    if users_per_owner is not None:
        parts = {name: rng.permutation(part)[:users_per_owner] for name, part in parts.items()}
    for name, part in parts.items():
        if len(part) < _MIN_OWNER_USERS:
            raise InputError(
                f"owner {name} has {len(part)} user(s) with enough items; an owner needs {_MIN_OWNER_USERS}, one to"
                " train on and one to hold out. Lower data.num_owners or data.min_interactions, or choose"
                " data.split = random."
            )
    return {name: np.sort(parts[name]) for name in sorted(parts)}


def _by_institution(users: IndexedUsers, num_owners: int) -> dict[str, IntArray]:
    if users.institutions is None:
        raise InputError("data.split = institution needs users indexed by institution.")
    names, codes, sizes = np.unique(users.institutions.astype(str), return_inverse=True, return_counts=True)
    if len(names) < num_owners:
        raise InputError(
            f"the data has {len(names)} institution(s) with users, and data.num_owners asks for {num_owners}."
            f" Set data.num_owners={len(names)}, or choose data.split = random."
        )
    largest = np.argsort(-sizes, kind="stable")[:num_owners]
    return {
        name: np.flatnonzero(codes == code)
        for name, code in zip(owner_names([str(names[code]) for code in largest]), largest, strict=True)
    }


def _at_random(
    num_users: int, num_owners: int, users_per_owner: int | None, rng: np.random.Generator
) -> dict[str, IntArray]:
    wanted = num_users if users_per_owner is None else num_owners * users_per_owner
    if wanted > num_users:
        raise InputError(
            f"{num_owners} owners with {users_per_owner} users each need {wanted} users; the data has {num_users} with"
            " enough items. Lower data.users_per_owner or data.num_owners."
        )
    dealt = rng.permutation(num_users)[:wanted]
    return dict(zip(_numbered(num_owners), np.array_split(dealt, num_owners), strict=True))


def _by_activity(
    lengths: IntArray, num_owners: int, dirichlet_alpha: float, rng: np.random.Generator
) -> dict[str, IntArray]:
    groups = np.array_split(np.argsort(lengths, kind="stable"), _ACTIVITY_GROUPS)
    for _ in range(_DIRICHLET_DRAWS):
        parts: list[list[IntArray]] = [[] for _ in range(num_owners)]
        for group in groups:
            shares = np.cumsum(rng.dirichlet(np.full(num_owners, dirichlet_alpha)))
            cuts = np.rint(shares[:-1] * len(group)).astype(np.int64)
            for part, dealt in zip(parts, np.split(rng.permutation(group), cuts), strict=True):
                part.append(dealt)
        dealt_users = [np.concatenate(part) for part in parts]
        if min(map(len, dealt_users)) >= _MIN_OWNER_USERS:
            return dict(zip(_numbered(num_owners), dealt_users, strict=True))
    raise InputError(
        f"{len(lengths)} users, dealt {_DIRICHLET_DRAWS} times with data.dirichlet_alpha={dirichlet_alpha:g}, always"
        f" left one of {num_owners} owners with fewer than {_MIN_OWNER_USERS}. Raise data.dirichlet_alpha or lower"
        " data.num_owners."
    )


def _numbered(num_owners: int) -> list[str]:
    width = max(2, len(str(num_owners)))
    return [f"owner-{number:0{width}}" for number in range(1, num_owners + 1)]


def owner_names(institutions: list[str]) -> list[str]:
    """A distinct folder name for each institution: lower-case letters, digits and hyphens."""
    names: list[str] = []
    for institution in institutions:
        plain = unicodedata.normalize("NFKD", institution).encode("ascii", "ignore").decode().lower()
        name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40] or "owner"
        taken = sum(other == name or other.startswith(f"{name}--") for other in names)
        names.append(f"{name}--{taken + 1}" if taken else name)
    return names
