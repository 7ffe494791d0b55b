"""Find the items that are used by the same users as an item."""

import numpy as np
import numpy.typing as npt

from shared.data.histories import Histories
from shared.errors import InputError

_ITEMS_AT_ONCE = 512


def neighbour_table(histories: Histories, *, num_neighbours: int) -> npt.NDArray[np.int32]:
    """The ``num_neighbours`` items with the greatest cosine to each item, most similar first.

    Cosine of the sets of users: users of both ÷ √(users of one × users of the other). Items never used together are no
    neighbours. Of equally similar items the smaller position comes first, but which of them are left out is open.

    Returns: shape ``(num_items, num_neighbours)``, int32 positions, -1 where there are no more.
    Guarantee:
        A function of ``histories`` alone, and as private as they are: it says who bought what together.
    Raises:
        InputError: ``num_neighbours`` is not between 1 and the number of other items.
    Reference:
        Sarwar et al. 2001, Item-based collaborative filtering, section 3.1.1, on binary histories.
    """
    num_items = histories.num_items
    if not 1 <= num_neighbours < num_items:
        raise InputError(
            f"neighbours: {num_neighbours} asked for; 1 to {num_items - 1} are possible in this catalogue."
        )
    rows = histories.to_csr()
    columns = rows.tocsc()
    used = np.maximum(np.asarray(rows.sum(axis=0), dtype=np.float32).ravel(), 1.0)
    table = np.full((num_items, num_neighbours), -1, dtype=np.int32)
    for start in range(0, num_items, _ITEMS_AT_ONCE):
        block = np.arange(start, min(start + _ITEMS_AT_ONCE, num_items))
        together = (columns[:, block].T @ rows).toarray()
        cosine = together / np.sqrt(used[block, None] * used)
        cosine[np.arange(len(block)), block] = 0.0
        nearest = np.sort(np.argpartition(-cosine, num_neighbours - 1, axis=1)[:, :num_neighbours], axis=1)
        values = np.take_along_axis(cosine, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        ranked = np.take_along_axis(nearest, order, axis=1)
        table[block] = np.where(np.take_along_axis(values, order, axis=1) > 0, ranked, -1)
    return table
