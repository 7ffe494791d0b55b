"""Make users with the help of a generator: new ones, denser or transformed copies of others."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from shared.augmentation.operators import Neighbours, Operators, add_items, transform
from shared.augmentation.synthesis import Condition, synthesise_users
from shared.augmentation.tracing import Traced, derive, released
from shared.data.histories import Histories
from shared.errors import InputError
from shared.generators.card import Generator
from shared.rng import stream

_USERS_AT_ONCE = 256

IntArray = npt.NDArray[np.int64]


def new_users(
    generator: Generator,
    *,
    num_users: int,
    items_per_user: int,
    seed: int,
    condition: Condition | None = None,
) -> Traced[Histories]:
    """:func:`synthesise_users` within the bound of the generator's card, of the generator's class."""
    bound = generator.card.max_items_per_user
    drawn = synthesise_users(
        generator.model,
        num_users=num_users,
        items_per_user=min(items_per_user, bound),
        max_items_per_user=bound,
        seed=seed,
        lengths=generator.card.lengths,
        condition=condition,
    )
    return released(drawn, generator.card)


def transformed(
    histories: Traced[Histories], operators: Operators, *, seed: int, neighbours: Traced[Neighbours] | None = None
) -> Traced[Histories]:
    """:func:`transform`, with a stream of chance of its own; internal where the users or their neighbours are."""
    rng = stream(seed, "operators")
    if neighbours is None:
        return derive(lambda users: transform(users, operators, rng=rng), histories)
    return derive(lambda users, table: transform(users, operators, rng=rng, neighbours=table), histories, neighbours)


def densified(
    histories: Traced[Histories],
    pool: Traced[Histories],
    *,
    shorter_than: int,
    added: int,
    seed: int,
    num_neighbours: int = 50,
) -> Traced[Histories]:
    """Short histories with items of the synthetic users who are most like them.

    A user's neighbours are the users of ``pool`` with the greatest cosine to it; items new to the user are drawn
    without replacement in proportion to the sum of the cosines of the neighbours who have them (Sarwar et al. 2000,
    user-based filtering, here among synthetic users). Each is put behind an interaction at random, with its time.

    Args:
        pool: synthetic users.
        shorter_than: users with fewer interactions, and one at least, are given items; the others stay as they are.
        added: items that each is given; fewer where its neighbours have no more.
    Guarantee:
        Every user stays in its place with all its interactions in their order. Internal where users or pool are.
    Raises:
        InputError: a number is below 1, or the catalogues differ.
    """
    if min(shorter_than, added, num_neighbours) < 1:
        raise InputError(
            f"densify: shorter_than={shorter_than}, added={added}, num_neighbours={num_neighbours} must be 1 or more."
        )

    def fill(users: Histories, synthetic: Histories) -> Histories:
        if users.num_items != synthetic.num_items:
            raise InputError(
                f"densify: users over {users.num_items} items, and synthetic users over {synthetic.num_items}. Use a"
                " generator of this catalogue."
            )
        rng = stream(seed, "densify")
        short = np.flatnonzero((users.lengths() < shorter_than) & (users.lengths() > 0))
        owners, items = _likely_items(users.select(short), synthetic, added, num_neighbours, rng)
        owners = short[owners]
        place = np.floor(rng.random(len(owners)) * users.lengths()[owners]).astype(np.int64)
        return add_items(users, items, after=users.indptr[owners] + place)

    return derive(fill, histories, pool)


def of_mass(synthetic: Traced[Histories], real: Traced[Histories], *, weight: float) -> Traced[Histories]:
    """The first users of ``synthetic`` whose interactions are at most ``weight`` times those of ``real``.

    Internal beside ``private`` users: how many stay tells how many interactions there are.

    Raises:
        InputError: ``weight`` is negative or not finite, or there are too few synthetic users for it.
    """
    if not (np.isfinite(weight) and weight >= 0):
        raise InputError(f"weight {weight} is not a mass ratio; it must be 0 or more.")

    def first(users: Histories, beside: Histories) -> Histories:
        wanted = weight * beside.num_interactions
        if users.num_interactions < wanted:
            raise InputError(
                f"weight {weight:g} asks for {wanted:,.0f} synthetic interactions; {users.num_users} users have"
                f" {users.num_interactions:,}. Draw more users."
            )
        return users.select(np.arange(int((users.indptr[1:] <= wanted).sum())))

    return derive(first, synthetic, real)


def _likely_items(
    users: Histories, pool: Histories, added: int, num_neighbours: int, rng: np.random.Generator
) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """(position of the user, item) of everything added, by user."""
    synthetic = _unit_rows(pool.to_csr())
    columns, binary = synthetic.T.tocsr(), pool.to_csr()
    num_neighbours, added = min(num_neighbours, pool.num_users), min(added, pool.num_items)
    owners, items = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for start in range(0, users.num_users if pool.num_users else 0, _USERS_AT_ONCE):
        rows = users.select(np.arange(start, min(start + _USERS_AT_ONCE, users.num_users))).to_csr()
        cosine = (_unit_rows(rows) @ columns).toarray()
        nearest = np.argpartition(-cosine, num_neighbours - 1, axis=1)[:, :num_neighbours]
        pointers = np.arange(0, nearest.size + 1, num_neighbours)
        closeness = np.take_along_axis(cosine, nearest, axis=1)
        weights = sp.csr_matrix((closeness.ravel(), nearest.ravel(), pointers), shape=cosine.shape)
        scores = (weights @ binary).toarray()
        scores[rows.nonzero()] = 0.0
        # The largest of logs plus Gumbel noise are draws without replacement (Kool et al. 2019, arXiv:1903.06059).
        with np.errstate(divide="ignore"):
            keys = np.log(scores) + rng.gumbel(size=scores.shape)
        best = np.argpartition(-keys, added - 1, axis=1)[:, :added]
        user, column = np.nonzero(np.take_along_axis(scores, best, axis=1) > 0)
        owners.append(user + start)
        items.append(best[user, column].astype(np.int32))
    return np.concatenate(owners), np.concatenate(items)


def _unit_rows(rows: sp.csr_matrix) -> sp.csr_matrix:
    lengths = np.sqrt(np.maximum(np.diff(rows.indptr), 1)).astype(np.float32)
    return sp.csr_matrix(sp.diags_array(1.0 / lengths) @ rows)
