"""Users with a structure that a recommender can find: each likes one group of items."""

import numpy as np

from shared.data.histories import Histories
from shared.data.splits import Split, split_histories


def planted_users(
    num_users: int, *, num_items: int = 60, num_groups: int = 6, loyalty: float = 0.9, rng: np.random.Generator
) -> Histories:
    """Histories of 8 items, each of the user's own group with chance ``loyalty``."""
    group_of = np.arange(num_items) % num_groups
    rows = []
    for _ in range(num_users):
        mine = group_of == rng.integers(num_groups)
        chance = np.where(mine, loyalty / mine.sum(), (1 - loyalty) / (~mine).sum())
        rows.append(rng.choice(num_items, size=8, replace=False, p=chance))
    return Histories.from_rows(rows, num_items)


def planted_split(num_users: int, *, rng: np.random.Generator, num_items: int = 60) -> Split:
    users = planted_users(num_users, num_items=num_items, rng=rng)
    return split_histories(users, holdout="users", holdout_share=0.3, fold_in_share=0.5, rng=rng)
