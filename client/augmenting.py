"""Write an owner's rows with synthetic ones beside them, each with its class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from client.owned_rows import TRAIN, OwnedRows, check_out, read_owned
from shared.augmentation.enrichment import densified, new_users, of_mass, transformed
from shared.augmentation.filters import coherent, novel, unlike
from shared.augmentation.lineage import EXPORTABLE, INTERNAL, Form, synthetic_table, write_tables
from shared.augmentation.neighbours import neighbour_table
from shared.augmentation.operators import Operators
from shared.augmentation.synthesis import Condition
from shared.augmentation.tracing import Traced, derive, private
from shared.config import Columns
from shared.data.histories import Histories
from shared.errors import InputError, RefusedError
from shared.generators.card import Generator, load_generator

Mode = Literal["new-users", "tail", "densify", "operators"]

_PLAIN_BEHAVIOUR = "interaction"
_NUM_NEIGHBOURS = 20
_TAIL, _SHORTER_THAN, _ADDED = 0.5, 10, 5  # where a recipe does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is put beside the real rows.

    Args:
        mode: ``new-users`` and ``tail`` add users of the generator (``tail`` lifts rare items), ``densify`` adds items
            to short real histories, ``operators`` adds a transformed copy of each real history.
        users: synthetic users drawn; in the last two modes those that are looked at for similar users and items.
        items_per_user: public mean length of their histories.
        tail: for ``tail``: see :class:`Condition`; by default 0.5.
        operators: for ``operators``.
        shorter_than, added: for ``densify``: users with fewer interactions (by default 10) are given so many items (5).
        weight: synthetic ÷ real interactions: only the first of the users drawn, up to this, are kept.
        max_similarity: users more alike than this (Jaccard's) to one another or to a real user are left out.
        min_lift: users whose items go together less than this are left out, see :func:`coherent`.
    Raises:
        InputError: a wish does not belong to the mode.
    """

    mode: Mode
    users: int = 1000
    items_per_user: int = 50
    tail: float | None = None
    operators: Operators | None = None
    shorter_than: int | None = None
    added: int | None = None
    weight: float | None = None
    max_similarity: float | None = None
    min_lift: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"augment: unknown mode {self.mode!r}; choose from {', '.join(get_args(Mode))}.")
        if (self.mode == "operators") != (self.operators is not None):
            raise InputError(
                "augment: operators, such as mask:0.2, are needed with mode operators, and belong to no other mode;"
                f" this is {self.mode} with {'none' if self.operators is None else 'some'}."
            )
        for name, mode in (("tail", "tail"), ("shorter_than", "densify"), ("added", "densify")):
            if getattr(self, name) is not None and self.mode != mode:
                raise InputError(f"augment: {name} belongs to mode {mode}, and this is {self.mode}. Leave it out.")
        if self.mode in ("densify", "operators"):
            for name in ("weight", "max_similarity", "min_lift"):
                if getattr(self, name) is not None:
                    raise InputError(f"augment: {name} chooses among new users, and mode {self.mode} makes none.")


def augment(
    data: Path,
    generator: Path,
    out: Path,
    recipe: Recipe,
    *,
    form: Form,
    seed: int,
    export: bool = False,
    columns: Columns | None = None,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Write to ``out`` all rows of ``data`` and those that ``recipe`` makes with the generator in ``generator``.

    Columns: ``user_id``, ``item_id``, ``timestamp``, ``behaviour`` and ``split`` where the data has them, and
    ``synthetic``, ``generator_id`` (empty for real rows, ``operators`` where no generator had a part), ``lineage``.
    Where real rows have times and new users have none, theirs count from 0: the order is told, and every split by time
    takes them for training. Where real rows have behaviours and new users have none, theirs is ``interaction``.

    A column ``split`` says what is held out: rows whose value is not ``train`` are written as they are and read for
    nothing else.

    Args:
        data: Parquet, CSV or RecBole file of the owner's interactions; never changed.
        seed: of all fresh randomness; it protects nobody.
        export: refuse instead of writing rows that must stay at home.
        columns: what ``data`` calls its columns.
        skip_bad_rows: leave bad rows out, counted, where they are otherwise refused.
    Returns: ``out``, ``mode``, ``generator_id``, ``rows`` by kind, ``lineage`` (rows by class) and ``left_out`` (counts
        by reason); for the owner's eyes.
    Guarantee:
        Real rows, and rows of whatever was made, chosen or counted by looking at them, are marked ``internal``.
        ``out`` is the old file or the whole new one.
    Raises:
        InputError: the data or the generator cannot be used, or ``out`` is one of them.
        RefusedError: ``export`` was asked for.
    """
    _check_out(out, data, generator)
    trained = load_generator(generator)
    owned = read_owned(data, trained, columns, skip_bad_rows=skip_bad_rows)
    if export:
        raise RefusedError(
            f"--export: {data} has {owned.rows.num_rows:,} rows of real users, which are internal, and so is every row"
            f" that was made or chosen by them. For rows that may leave, use `fedaug synthesize --generator {generator}"
            " --export`, which looks at no user; or leave --export out, and keep the file at home."
        )
    made = _added_rows(recipe, trained, owned, seed=seed)
    real = _real_rows(owned)
    table = pa.concat_tables([real, _like(made, real)])
    write_tables(out, [_coded(table)], form)
    num_exportable = pc.sum(pc.equal(table.column("lineage"), EXPORTABLE)).as_py()
    return {
        "out": str(out),
        "mode": recipe.mode,
        "generator_id": trained.generator_id,
        "rows": {
            "real": int(owned.is_train.sum()),
            "held out": int((~owned.is_train).sum()),
            "synthetic": made.num_rows,
        },
        "lineage": {EXPORTABLE: num_exportable, INTERNAL: table.num_rows - num_exportable},
        "left_out": {reason: count for reason, count in {**owned.rows.skipped, **owned.users.counts}.items() if count},
    }


def _check_out(out: Path, data: Path, generator: Path) -> None:
    if out.resolve().parent == generator.resolve():
        raise InputError(f"--out {out} would overwrite what is read. Give another path.")
    check_out(out, data)


def _added_rows(recipe: Recipe, generator: Generator, owned: OwnedRows, *, seed: int) -> pa.Table:
    if recipe.operators is not None:
        return _copies(recipe, recipe.operators, generator, owned, seed=seed)
    drawn = _drawn(recipe, generator, seed)
    if recipe.mode == "densify":
        events = private(owned.events)
        shorter_than, added = recipe.shorter_than or _SHORTER_THAN, recipe.added or _ADDED
        denser = densified(events, drawn, shorter_than=shorter_than, added=added, seed=seed)
        return _rows_added_to(owned, denser, generator)
    chosen = _chosen(recipe, drawn, private(owned.users.histories))
    return _rows_of(chosen, generator, generator.card.behaviours, made_by=generator.generator_id)


def _drawn(recipe: Recipe, generator: Generator, seed: int) -> Traced[Histories]:
    tail = _TAIL if recipe.tail is None else recipe.tail
    condition = Condition(tail=tail) if recipe.mode == "tail" else None
    return new_users(
        generator, num_users=recipe.users, items_per_user=recipe.items_per_user, seed=seed, condition=condition
    )


def _copies(recipe: Recipe, operators: Operators, generator: Generator, owned: OwnedRows, *, seed: int) -> pa.Table:
    events = private(owned.events)
    if not operators.need_neighbours:
        copies = transformed(events, operators, seed=seed)
        return _rows_of(copies, generator, owned.behaviours, made_by="operators")
    count = min(_NUM_NEIGHBOURS, len(generator.item_ids) - 1)
    drawn = _drawn(recipe, generator, seed)
    table = derive(lambda users: neighbour_table(users, num_neighbours=count), drawn)
    copies = transformed(events, operators, seed=seed, neighbours=table)
    return _rows_of(copies, generator, owned.behaviours, made_by=generator.generator_id)


def _chosen(recipe: Recipe, users: Traced[Histories], real: Traced[Histories]) -> Traced[Histories]:
    if recipe.min_lift is not None:
        users = coherent(users, min_lift=recipe.min_lift)
    if recipe.max_similarity is not None:
        users = novel(users, max_similarity=recipe.max_similarity)
        users = unlike(users, real, max_similarity=recipe.max_similarity)
    if recipe.weight is not None:
        users = of_mass(users, real, weight=recipe.weight)
    return users


def _rows_added_to(owned: OwnedRows, denser: Traced[Histories], generator: Generator) -> pa.Table:
    """The interactions of ``denser`` that the owner's own users did not have."""
    had, has = (
        np.repeat(np.arange(users.num_users), users.lengths()) * users.num_items + users.items
        for users in (owned.events, denser.value)
    )
    added = derive(lambda users: users.keep(~np.isin(has, had)), denser)
    names = pa.array(np.repeat(owned.users.user_ids, added.value.lengths()), pa.string())
    table = _rows_of(added, generator, owned.behaviours, made_by=generator.generator_id)
    return table.set_column(0, "user_id", names)


def _real_rows(owned: OwnedRows) -> pa.Table:
    rows = owned.rows
    columns: dict[str, Any] = {
        "user_id": rows.users.labels.take(pa.array(rows.users.codes)),
        "item_id": rows.items.labels.take(pa.array(rows.items.codes)),
    }
    if rows.timestamps is not None:
        columns["timestamp"] = pa.array(rows.timestamps)
    if rows.behaviours is not None:
        columns["behaviour"] = rows.behaviours.labels.take(pa.array(rows.behaviours.codes))
    if owned.has_split and rows.institutions is not None:
        columns["split"] = rows.institutions.labels.take(pa.array(rows.institutions.codes))
    columns["synthetic"] = pa.array(np.zeros(rows.num_rows, dtype=bool))
    columns["generator_id"] = _repeated("", rows.num_rows)
    columns["lineage"] = _repeated(INTERNAL, rows.num_rows)
    return pa.table(columns)


def _like(made: pa.Table, real: pa.Table) -> pa.Table:
    """``made`` with the columns of ``real``."""
    places = np.empty(0, dtype=np.int64)
    if "timestamp" not in made.column_names:
        # Codes are given in order of appearance, and a user's rows stand together.
        counts = np.bincount(made.column("user_id").combine_chunks().dictionary_encode().indices.to_numpy())
        places = np.arange(made.num_rows) - np.repeat(np.cumsum(counts) - counts, counts)
    fallback = {
        "timestamp": pa.array(places),
        "behaviour": _repeated(_PLAIN_BEHAVIOUR, made.num_rows),
        "split": _repeated(TRAIN, made.num_rows),
    }
    return pa.table(
        {name: made.column(name) if name in made.column_names else fallback[name] for name in real.column_names}
    )


def _rows_of(users: Traced[Histories], generator: Generator, behaviours: tuple[str, ...], *, made_by: str) -> pa.Table:
    """Their rows, with texts in place of dictionaries, so that tables with other dictionaries can go before."""
    table = synthetic_table(
        users.value, generator.item_ids, generator_id=made_by, exportable=users.exportable, behaviours=behaviours
    )
    kinds = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))


def _coded(table: pa.Table) -> pa.Table:
    """``table`` with dictionaries in place of texts, as files are written from."""
    return pa.table(
        {
            name: column.dictionary_encode() if pa.types.is_string(column.type) else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    )


def _repeated(text: str, count: int) -> pa.Array:
    return pa.array([text], pa.string()).take(pa.array(np.zeros(count, dtype=np.int64)))
