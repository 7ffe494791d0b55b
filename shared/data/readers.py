"""Read interactions from a file or database so that no row is changed or lost unseen."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa

from shared.config import Columns
from shared.data.checking import Source, collect, column_types, literal
from shared.data.databases import database_url, open_database
from shared.data.interactions import Interactions
from shared.errors import InputError

Format = Literal["auto", "parquet", "csv", "sql", "recbole", "movielens"]

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".inter": "recbole",
    ".db": "sql",
    ".sqlite": "sql",
    ".sqlite3": "sql",
    ".duckdb": "sql",
}
_MOVIELENS_NAMES = {"u.data", "ratings.dat"}


def read_interactions(
    path: Path | str,
    *,
    columns: Columns,
    format: Format = "auto",
    table: str = "",
    skip_bad_rows: bool = False,
) -> Interactions:
    """Read every row of ``path``, in its order.

    Row numbers in messages count data rows from 1; a header is not counted. Columns ``timestamp``, ``rating``,
    ``behaviour`` and ``institution`` may be absent or empty throughout; a timestamp, behaviour or institution
    that only some rows have is a bad row. Ratings are checked and not kept: every row is an interaction.
    Fractions of a second are dropped. A floating-point id column (how missing integers are often stored) must
    hold whole numbers.

    Args:
        path: a file, or the URL of a database (``postgresql://host/name``; the password belongs in PGPASSWORD).
        columns: what the source calls its columns; MovieLens files have no names and ignore it.
        format: ``auto`` decides by the file's name.
        table: table or view of a database, perhaps with its schema; needed where there are several.
        skip_bad_rows: leave bad rows out, counted by reason, where they are otherwise refused.
    Raises:
        InputError: the source is missing, empty or unreadable, lacks a column, or has bad rows.
    """
    url = database_url(path)
    shown = re.sub(r"//[^@/]*@", "//", url) if url else str(path)
    file = Path(path)
    if not url:
        _check_file(file)
    kind = ("sql" if url else _format_of(file)) if format == "auto" else format
    try:
        with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
            # Users' rows must not be spilled into whatever folder the command happens to run in.
            connection.execute("SET temp_directory = ''; SET enable_progress_bar = false")
            source = _open(connection, url or file, kind, shown, columns, table)
            return collect(connection, source, skip_bad_rows=skip_bad_rows)
    except (duckdb.Error, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{shown}: not readable as {kind}: {reason}. Check the file, or set data.format.") from None


def _check_file(file: Path) -> None:
    if not file.exists():
        raise InputError(f"no file at {file}. Check data.path, or leave it empty to run the built-in sample.")
    if file.is_dir():
        raise InputError(f"{file} is a folder. Give one file or database in data.path.")
    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty (0 bytes). Export it again, or give another file in data.path.")


def _format_of(file: Path) -> Format:
    if file.name in _MOVIELENS_NAMES:
        return "movielens"
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{file}: cannot tell the format from the name. Set data.format to parquet, csv, sql, recbole or movielens."
        )
    return _SUFFIXES[suffix.lower()]


def _open(
    connection: duckdb.DuckDBPyConnection, path: Path | str, kind: str, shown: str, columns: Columns, table: str
) -> Source:
    if kind == "sql":
        return open_database(connection, path, shown, columns, table)
    file = Path(path)
    if kind == "parquet":
        relation = f"read_parquet({literal(file)})"
        return Source(shown, relation, column_types(connection, relation), columns)
    if kind == "movielens":
        names = ["user_id", "item_id", "rating", "timestamp"]
        delimiter = "::" if "::" in _first_line(file) else "\t"
        relation = _read_text(file, names, delimiter=delimiter, quote="", header=False)
        return Source(shown, relation, _all_text(names), Columns(), whole_number_ids=True, is_delimited=True)
    if kind == "recbole":
        header = _first_line(file).split("\t")
        if not all(":" in name for name in header):
            raise InputError(
                f"{shown}: the first line must name columns as name:type, for example user_id:token, separated by"
                f" tabs. Found: {', '.join(header[:6])}. Set data.format if this is no RecBole file."
            )
        names = [name.rsplit(":", 1)[0] for name in header]
        relation = _read_text(file, names, delimiter="\t", quote="", header=True)
        return Source(shown, relation, _all_text(names), columns, is_delimited=True)
    names, delimiter = _csv_header(_first_line(file), columns)
    relation = _read_text(file, names, delimiter=delimiter, quote='"', header=True)
    return Source(shown, relation, _all_text(names), columns, is_delimited=True)


def _first_line(file: Path) -> str:
    # input_stream undoes .gz by the file's name, as DuckDB does.
    with pa.input_stream(file) as stream:
        start: bytes = stream.read(1 << 20)
    try:
        return start.split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text. Convert it, or set data.format if it is not a text file.") from None


def _csv_header(line: str, columns: Columns) -> tuple[list[str], str]:
    """Column names and delimiter: the first of comma, tab, semicolon and bar that yields the columns asked for."""
    readings = {d: [name.strip() for name in next(csv.reader([line], delimiter=d), [])] for d in (",", "\t", ";", "|")}
    for delimiter, names in readings.items():
        if columns.user_id in names and columns.item_id in names:
            return names, delimiter
    delimiter = max(readings, key=lambda d: len(readings[d]))
    return readings[delimiter], delimiter


def _read_text(file: Path, names: Sequence[str], *, delimiter: str, quote: str, header: bool) -> str:
    # Nothing is sniffed: the same bytes must not read differently because a later row looks different.
    cells = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in names)
    return (
        f"read_csv({literal(file)}, auto_detect = false, header = false, skip = {int(header)},"
        f" delim = {literal(delimiter)}, quote = {literal(quote)}, escape = {literal(quote)}, columns = {{{cells}}},"
        " store_rejects = true, rejects_limit = 0)"
    )


def _all_text(names: Sequence[str]) -> dict[str, str]:
    return dict.fromkeys(names, "VARCHAR")
