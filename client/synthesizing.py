"""Write a file of users drawn from a generator, each row with its lineage."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from client.screen import warn
from shared.augmentation.lineage import EXPORTABLE, INTERNAL, Form, synthetic_tables, write_tables
from shared.augmentation.synthesis import Condition, synthesise_blocks
from shared.data.histories import Histories
from shared.errors import InputError, RefusedError
from shared.generators.card import TUNED_AT_HOME, GeneratorCard, load_generator
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE

_MOST_NAMED = 20


def synthesize(
    directory: Path,
    users: int,
    out: Path,
    *,
    form: Form,
    items_per_user: int,
    seed: int,
    condition: Condition | None = None,
    segment: tuple[Path, str] | None = None,
    export: bool = False,
) -> dict[str, Any]:
    """Draw users from the generator in ``directory`` into the file ``out``, a block at a time.

    Rows of a generator that is not exportable are marked internal, with a warning on stderr.

    Args:
        items_per_user: public mean length, cut to the generator's bound; not read where its card tells lengths.
        condition: which users to draw.
        segment: a public file and the attribute whose items they should favour, see :func:`read_segment`.
        export: the rows are to leave, so a generator that is not exportable is refused.
    Returns:
        what was written: out, users, interactions, generator_id, lineage.
    Raises:
        RefusedError: ``export`` of what must stay; nothing was written.
        InputError: the generator or a number cannot be used, or ``out`` cannot be written.
    """
    generator = load_generator(directory)
    obstacles = export_obstacles(generator.card)
    if export and obstacles:
        raise RefusedError(
            f"{directory}: users of this generator must not leave. {' '.join(obstacles)} Without --export the rows are"
            " written and marked internal, for use at home."
        )
    wanted = Condition() if condition is None else condition
    if segment is not None:
        wanted = replace(wanted, segment=read_segment(*segment, generator.item_ids))
    bound = generator.card.max_items_per_user
    blocks = _Counted(
        synthesise_blocks(
            generator.model,
            num_users=users,
            items_per_user=min(items_per_user, bound),
            max_items_per_user=bound,
            seed=seed,
            lengths=generator.card.lengths,
            condition=wanted,
        )
    )
    tables = synthetic_tables(
        blocks,
        generator.item_ids,
        generator_id=generator.generator_id,
        exportable=not obstacles,
        behaviours=generator.card.behaviours,
    )
    write_tables(out, tables, form)
    if obstacles:
        warn(f"Every row is marked internal and must not leave. {' '.join(obstacles)}")
    return {
        "out": str(out),
        "users": users,
        "interactions": blocks.num_interactions,
        "generator_id": generator.generator_id,
        "lineage": INTERNAL if obstacles else EXPORTABLE,
    }


def export_obstacles(card: GeneratorCard) -> tuple[str, ...]:
    """Why users of a generator must stay where they are, each with what to do; empty exactly where they may leave."""
    if card.exportable:
        return ()
    found = []
    if card.noise == TUNED_AT_HOME:
        found.append(
            "An owner's own users taught it after it was received, without noise. Draw from the generator as it was"
            " received."
        )
    elif card.noise == SEEDED_NOISE:
        found.append(
            "Its noise is seeded, so anybody can repeat and subtract it: it is from a simulation. Train with real"
            " owners, whose agents seed nothing."
        )
    elif card.noise == NO_NOISE or not math.isfinite(card.epsilon):
        found.append("It was trained without privacy: epsilon is infinite. Train with a finite privacy.epsilon.")
    elif card.noise != LOCAL_NOISE:
        found.append(
            f"Its card calls the noise {card.noise!r}, which this version does not know to protect anybody. Use the"
            " version of fedaug that wrote the card."
        )
    if card.catalogue.get("source") == "assumed public":
        found.append(
            "Its catalogue was read off the users' data, so that naming an item tells that somebody used it. Train with"
            " a public item list in data.catalogue."
        )
    return tuple(found) or ("Its card says that it must stay. Ask whoever delivered it why.",)


def read_segment(path: Path, attribute: str, item_ids: Sequence[str]) -> tuple[int, ...]:
    """Positions in the catalogue of the items that have ``attribute``.

    Args:
        path: public CSV or Parquet file with columns ``item_id`` and ``attribute``, one row for each pair.
    Raises:
        InputError: the file cannot be read, nothing has the attribute, or no item of the catalogue has it.
    """
    table = _item_attributes(path)
    known = pc.index_in(table["item_id"], value_set=pa.array(list(item_ids), pa.string()))
    has = pc.equal(table["attribute"], attribute)
    here = known.filter(has).drop_null()
    if len(here):
        return tuple(sorted(set(here.to_pylist())))
    present = sorted(set(table["attribute"].filter(pc.is_valid(known)).drop_null().to_pylist()))
    named = ", ".join(present[:_MOST_NAMED]) + (f", … ({len(present)} in all)" if len(present) > _MOST_NAMED else "")
    what = "has items, but none of the generator's catalogue" if pc.any(has).as_py() else "is no attribute there"
    raise InputError(
        f"{path}: {attribute!r} {what}. Of the catalogue's {len(item_ids)} items some have:"
        f" {named or 'nothing; are the item ids those of the catalogue?'}"
    )


def _item_attributes(path: Path) -> pa.Table:
    names = ["item_id", "attribute"]
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pyarrow.parquet.read_table(path, columns=names)
        else:
            # Ids stay text: "007" is not 7.
            options = pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), include_columns=names, strings_can_be_null=False
            )
            table = pyarrow.csv.read_csv(path, convert_options=options)
        return pa.table({name: table.column(name).cast(pa.string()) for name in names})
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are ValueErrors and KeyErrors
        raise InputError(
            f"{path}: not a table of item attributes: {str(error).splitlines()[0]}. Expected CSV or Parquet with"
            " columns item_id and attribute, a row for each attribute of an item."
        ) from None


class _Counted:
    """Blocks on their way, and how many interactions went by."""

    def __init__(self, blocks: Iterator[Histories]) -> None:
        self._blocks = blocks
        self.num_interactions = 0

    def __iter__(self) -> Iterator[Histories]:
        for block in self._blocks:
            self.num_interactions += block.num_interactions
            yield block
