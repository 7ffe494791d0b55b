"""Turn the rows of a table into checked, coded interactions, naming each row that cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.config import Columns
from shared.data.interactions import Coded, Interactions
from shared.errors import InputError

_BATCH_ROWS = 500_000
_LAST_SECOND = 253_402_300_799  # 9999-12-31; anything later is milliseconds, not seconds
_MISSING = "('', 'nan', 'null')"  # compared in lower case

# In order of priority: a row with two problems is counted under the first.
_PROBLEMS = (
    "user_id is missing",
    "item_id is missing",
    "user_id is not a whole number",
    "item_id is not a whole number",
    "timestamp is not a number (epoch seconds)",
    "timestamp is NaN or infinite",
    "timestamp is negative",
    "timestamp lies after the year 9999 (milliseconds? seconds are expected)",
    "rating is not a number",
    "rating is NaN or infinite",
    "rating is negative",
)
_REPEATED = "repeats an earlier row in every column"

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}


@dataclass(frozen=True, slots=True)
class Source:
    """One table that DuckDB can scan, with what the checks need to know about it.

    Args:
        name: shown in messages, without credentials.
        relation: SQL that may stand after FROM.
        types: DuckDB type of each column, by its name in the source.
        columns: what the source calls our columns.
        whole_number_ids: the format promises integer ids, so anything else is a bad row.
        is_delimited: lines that do not split into the right cells are collected by DuckDB's reject table.
    """

    name: str
    relation: str
    types: Mapping[str, str]
    columns: Columns
    whole_number_ids: bool = False
    is_delimited: bool = False


def collect(connection: duckdb.DuckDBPyConnection, source: Source, *, skip_bad_rows: bool) -> Interactions:
    """Read ``source`` in one pass: code the good rows, number and count the bad ones.

    Guarantee:
        The result's rows and the counts in ``skipped`` add up to the rows of the source.
    Raises:
        InputError: a column is absent or of an unusable type, there are no rows, or some are bad.
    """
    reader = connection.sql(_checked_select(source)).to_arrow_reader(_BATCH_ROWS)
    coded: dict[str, list[Any]] = {"user_id": [], "item_id": [], "behaviour": [], "institution": []}
    seconds: list[npt.NDArray[np.int64]] = []
    prints: list[npt.NDArray[np.uint64]] = []
    problems: list[npt.NDArray[np.uint8]] = []
    known = Counter[str]()
    for batch in reader:
        problems.append(batch["problem"].to_numpy())
        prints.append(batch["fingerprint"].to_numpy())
        for name, parts in coded.items():
            parts.append(pc.dictionary_encode(batch[name]))
            known[name] += len(batch) - batch[name].null_count
        known["timestamp"] += len(batch) - batch["timestamp"].null_count
        seconds.append(pc.fill_null(batch["timestamp"], -1).to_numpy())

    problem = np.concatenate([np.empty(0, np.uint8), *problems])
    broken = _broken_lines(connection) if source.is_delimited else []
    if len(problem) + len(broken) == 0:
        raise InputError(f"{source.name} has no rows. Export it again, or give another file in data.path.")
    timestamps = np.concatenate([np.empty(0, np.int64), *seconds])
    reasons = list(_PROBLEMS)

    def mark(rows: npt.NDArray[np.intp], reason: str) -> None:
        reasons.append(reason)
        problem[rows] = np.where(problem[rows] == 0, len(reasons), problem[rows])

    for name in ("behaviour", "institution"):
        if 0 < known[name] < len(problem):
            nulls = pa.chunked_array(coded[name]).is_null().to_numpy()
            mark(np.flatnonzero(nulls), f"{name} is missing, though other rows have one")
    if 0 < known["timestamp"] < len(problem):
        mark(np.flatnonzero(timestamps < 0), "timestamp is missing, though other rows have one")
    mark(_repeated_rows(np.concatenate([np.empty(0, np.uint64), *prints])), _REPEATED)

    bad = problem > 0
    counts = {reasons[code - 1]: int(n) for code, n in enumerate(np.bincount(problem)) if code and n}
    counts.update(Counter(reason for _, reason in broken))
    if counts and not skip_bad_rows:
        raise InputError(_refusal(source.name, problem, reasons, broken, counts))
    if bad.all():
        total = len(bad) + len(broken)
        raise InputError(
            f"{source.name}: none of its {total} rows can be used ({_listing(counts)})."
            " Check data.columns and data.format."
        )
    columns = {name: Coded.from_dictionaries(parts) for name, parts in coded.items() if known[name]}
    everything = Interactions(
        source=source.name,
        users=columns["user_id"],
        items=columns["item_id"],
        timestamps=timestamps if known["timestamp"] else None,
        behaviours=columns.get("behaviour"),
        institutions=columns.get("institution"),
        skipped=counts,
    )
    return everything.keep(~bad) if bad.any() else everything


# --- the query -----------------------------------------------------------------------------------------------


def _checked_select(source: Source) -> str:
    names = _present(source)
    types = {ours: source.types[theirs].split("(")[0] for ours, theirs in names.items()}
    cell = {ours: quoted(theirs) for ours, theirs in names.items()}
    flaws: dict[str, str] = {}  # problem -> SQL condition
    chosen = {
        name: _identifier(name, cell[name], types[name], flaws, source.whole_number_ids)
        for name in ("user_id", "item_id")
    }
    seconds = _number("timestamp", cell.get("timestamp"), types.get("timestamp", ""), flaws)
    _number("rating", cell.get("rating"), types.get("rating", ""), flaws)
    flaws["timestamp lies after the year 9999 (milliseconds? seconds are expected)"] = f"{seconds} > {_LAST_SECOND}"
    chosen["timestamp"] = f"TRY_CAST(floor({seconds}) AS BIGINT)"
    for name in ("behaviour", "institution"):
        chosen[name] = _label(cell[name]) if name in cell else "CAST(NULL AS VARCHAR)"
    cases = " ".join(f"WHEN {flaws[p]} THEN {i}" for i, p in enumerate(_PROBLEMS, 1) if p in flaws)
    outputs = ", ".join(f"{sql} AS {name}" for name, sql in chosen.items())
    # The fingerprint covers every column: two lines of one bill that differ in quantity are no duplicates.
    return (
        f"SELECT {outputs}, CAST(CASE {cases} ELSE 0 END AS UTINYINT) AS problem,"
        f" hash(*COLUMNS(*)) AS fingerprint FROM {source.relation}"
    )


def _present(source: Source) -> dict[str, str]:
    """Our name -> the source's name, for the columns it has; complains about those it must have."""
    wanted = source.columns.model_dump()
    missing = [
        ours
        for ours, theirs in wanted.items()
        # A name that somebody set was meant, even where the column is optional.
        if theirs not in source.types and (ours in ("user_id", "item_id") or theirs != ours)
    ]
    if missing:
        found = list(source.types)
        if all(_is_number(name) for name in found):
            advice = "The first line looks like data: it must name the columns."
        else:
            example = missing[0]
            advice = (
                f"It has {', '.join(found[:12])}{' ...' if len(found) > 12 else ''}."
                f" Say which one is meant, for example --set data.columns.{example}={found[0]}."
            )
        lacking = ", ".join(wanted[name] for name in missing)
        raise InputError(f"{source.name}: no column {lacking}. {advice}")
    return {ours: theirs for ours, theirs in wanted.items() if theirs in source.types}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _identifier(name: str, cell: str, kind: str, flaws: dict[str, str], whole_number: bool) -> str:
    """SQL for an id as text or integer, null where it is missing or unusable."""
    if kind in _INTEGERS:
        flaws[f"{name} is missing"] = f"{cell} IS NULL"
        return cell
    if kind in ("FLOAT", "DOUBLE"):
        flaws[f"{name} is missing"] = f"{cell} IS NULL OR isnan({cell})"
        flaws[f"{name} is not a whole number"] = f"isinf({cell}) OR floor({cell}) != {cell} OR abs({cell}) > 1e15"
        return f"TRY_CAST({cell} AS BIGINT)"
    text = _label(cell)
    flaws[f"{name} is missing"] = f"{text} IS NULL"
    if whole_number:
        flaws[f"{name} is not a whole number"] = f"NOT regexp_full_match({cell}, '[0-9]+')"
    return text


def _label(cell: str) -> str:
    """SQL for a cell as text, null where it is empty or says NaN or NULL."""
    text = f"CAST({cell} AS VARCHAR)"
    return f"CASE WHEN lower(trim({text})) IN {_MISSING} THEN NULL ELSE {text} END"


def _number(name: str, cell: str | None, kind: str, flaws: dict[str, str]) -> str:
    """SQL for a number of any source type as DOUBLE, null where absent; says what may be wrong with it."""
    if cell is None:
        return "CAST(NULL AS DOUBLE)"
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"epoch({cell})"
    number = f"TRY_CAST({cell} AS DOUBLE)"
    unit = " (epoch seconds)" if name == "timestamp" else ""
    present = f"trim({cell}) != ''" if kind == "VARCHAR" else f"{cell} IS NOT NULL"
    flaws[f"{name} is not a number{unit}"] = f"{present} AND {number} IS NULL"
    flaws[f"{name} is NaN or infinite"] = f"isnan({number}) OR isinf({number})"
    flaws[f"{name} is negative"] = f"{number} < 0"
    return number


def quoted(name: str) -> str:
    """``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """``value`` as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def column_types(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """DuckDB type of each column of what may stand after FROM."""
    return {row[0]: str(row[1]) for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}


# --- what is wrong -------------------------------------------------------------------------------------------


def _broken_lines(connection: duckdb.DuckDBPyConnection) -> list[tuple[int, str]]:
    """Lines that do not split into cells: (line number, reason), a line once."""
    rows = connection.execute(
        "SELECT line, min(lower(CAST(error_type AS VARCHAR))) FROM reject_errors GROUP BY line ORDER BY line"
    ).fetchall()
    return [(int(line), f"the line is broken ({reason})") for line, reason in rows]


def _repeated_rows(prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Positions of rows whose fingerprint occurred before; 64 bits collide once in 10^6 files of 10^7 rows."""
    ordered = np.sort(prints)
    if len(prints) < 2 or not (ordered[1:] == ordered[:-1]).any():
        return np.empty(0, dtype=np.intp)
    order = np.argsort(prints, kind="stable")
    return np.sort(order[1:][prints[order[1:]] == prints[order[:-1]]])


def _refusal(
    source: str,
    problem: npt.NDArray[np.uint8],
    reasons: Sequence[str],
    broken: Sequence[tuple[int, str]],
    counts: Mapping[str, int],
) -> str:
    total = sum(counts.values())
    if broken:  # rows after a broken line have no certain number
        where = f"line {broken[0][0]}: {broken[0][1]}"
    else:
        first = int(np.flatnonzero(problem)[0])
        where = f"row {first + 1}: {reasons[problem[first] - 1]}"
    everything = f" All reasons: {_listing(counts)}." if total > 1 else ""
    return (
        f"{source}, {where}. {total} of {len(problem) + len(broken)} rows cannot be used.{everything}"
        " Correct the source, or leave such rows out, counted, with --skip-bad-rows."
    )


def _listing(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))
