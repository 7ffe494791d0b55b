"""Let DuckDB scan a table of another database."""

import importlib
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from shared.config import Columns
from shared.data.checking import Source, column_types, literal, quoted
from shared.errors import InputError

_URL = re.compile(r"^(postgres|postgresql|mysql):/?/?", re.IGNORECASE)
_EXTENSIONS = {"postgres": "postgres", "postgresql": "postgres", "mysql": "mysql"}
_TABLES = "SELECT table_schema, table_name FROM information_schema.tables WHERE {} ORDER BY 1, 2"


def database_url(path: Path | str) -> str | None:
    """The URL ``path`` stands for, mended where :class:`Path` folded its slashes; None for a file."""
    text = str(path)
    match = _URL.match(text)
    return f"{match[1].lower()}://{text[match.end() :]}" if match else None


def open_database(
    connection: duckdb.DuckDBPyConnection, path: Path | str, shown: str, columns: Columns, table: str
) -> Source:
    """One table of the SQLite or DuckDB file, or of the database at the URL, ``path``.

    Args:
        shown: the name for messages, without credentials.
        table: which one; may be empty where there is only one.
    Raises:
        InputError: the database cannot be opened, or ``table`` does not name one of its tables.
    """
    if isinstance(path, str):
        driver = _postgres_driver() if path.startswith("postgres") else None
        if driver is None:
            return _attached(connection, path, shown, columns, table)
        connection.register("source_rows", _postgres_reader(driver, path, shown, table))
        return Source(shown, "source_rows", column_types(connection, "source_rows"), columns)
    with path.open("rb") as file:
        is_sqlite = file.read(16).startswith(b"SQLite format 3")
    if not is_sqlite:
        return _attached(connection, path, shown, columns, table)
    reader = _sqlite_reader(path, shown, table)
    connection.register("source_rows", reader)
    return Source(shown, "source_rows", dict.fromkeys(reader.schema.names, "VARCHAR"), columns)


def _attached(
    connection: duckdb.DuckDBPyConnection, path: Path | str, shown: str, columns: Columns, table: str
) -> Source:
    options = "READ_ONLY"
    if isinstance(path, str):
        extension = _EXTENSIONS[path.split(":", 1)[0]]
        options += f", TYPE {extension}"
        try:
            connection.execute(f"INSTALL {extension}; LOAD {extension}")
        except duckdb.Error:
            driver = " or install the package adbc-driver-postgresql," if extension == "postgres" else ""
            raise InputError(
                f"{shown}: DuckDB's extension {extension}, which reads this database, is not installed and could not"
                f" be downloaded. Run `python -c \"import duckdb; duckdb.sql('INSTALL {extension}')\"` once with"
                f" network access,{driver} or export the table to Parquet and give that file in data.path."
            ) from None
    connection.execute(f"ATTACH {literal(path)} AS source ({options})")
    listing = connection.execute(_TABLES.format("table_catalog = 'source'")).fetchall()
    relation = "source." + _choose_table(listing, table, shown)
    return Source(shown, relation, column_types(connection, relation), columns)


def _choose_table(listing: Sequence[tuple[str, str]], table: str, shown: str) -> str:
    """The SQL name of ``table`` among (schema, name) pairs; the schemas main and public need not be named."""
    names = {
        name if schema in ("main", "public") else f"{schema}.{name}": f"{quoted(schema)}.{quoted(name)}"
        for schema, name in listing
    }
    if not names:
        raise InputError(f"{shown}: the database has no tables. Check data.path.")
    if table in names:
        return names[table]
    listed = ", ".join(list(names)[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    if table:
        raise InputError(f"{shown}: no table or view {table}. It has {listed}; name one in data.table.")
    if len(names) > 1:
        raise InputError(f"{shown}: several tables: {listed}. Name one in data.table.")
    return next(iter(names.values()))


def _sqlite_reader(file: Path, shown: str, table: str) -> Any:
    """An Arrow reader over one table as text, which every cell of SQLite can become.

    Through the standard library: DuckDB's own reader is an extension that has to be downloaded.
    """
    try:
        address = f"file:{urllib.parse.quote(str(file.resolve()))}?mode=ro"
        connection = sqlite3.connect(address, uri=True, check_same_thread=False)
        listing = connection.execute(
            "SELECT 'main', name FROM sqlite_master"
            " WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY name"
        ).fetchall()
        chosen = _choose_table(listing, table, shown)
        names = [column[0] for column in connection.execute(f"SELECT * FROM {chosen} LIMIT 0").description]
        texts = ", ".join(f"CAST({quoted(name)} AS TEXT)" for name in names)
        cursor = connection.execute(f"SELECT {texts} FROM {chosen}")
    except sqlite3.Error as error:
        raise InputError(f"{shown}: SQLite refuses the file: {error}. Check data.path and data.table.") from None
    schema = pa.schema([(name, pa.string()) for name in names])

    def batches() -> Iterator[Any]:
        while rows := cursor.fetchmany(100_000):
            cells = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            yield pa.record_batch(cells, schema=schema)
        connection.close()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _postgres_driver() -> Any | None:
    """Arrow's own PostgreSQL driver, where it is installed; it needs no download at run time."""
    try:
        return importlib.import_module("adbc_driver_postgresql.dbapi")
    except ImportError:
        return None


def _postgres_reader(driver: Any, url: str, shown: str, table: str) -> Any:
    """An Arrow reader over one table in the server's order."""
    try:
        connection = driver.connect(url)
        cursor = connection.cursor()
        cursor.execute(_TABLES.format("table_schema NOT IN ('pg_catalog', 'information_schema')"))
        cursor.execute(f"SELECT * FROM {_choose_table(cursor.fetchall(), table, shown)}")
        reader = cursor.fetch_record_batch()
    except driver.Error as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{shown}: {reason}. Check data.path, and PGPASSWORD for the password.") from None
    # Types that Arrow lacks, such as numeric, travel as text inside an opaque extension type.
    stored = [field.type.storage_type if _is_opaque(field.type) else field.type for field in reader.schema]
    schema = pa.schema([(field.name, kind) for field, kind in zip(reader.schema, stored, strict=True)])

    def batches() -> Iterator[Any]:
        for batch in reader:
            cells = [cell.storage if _is_opaque(cell.type) else cell for cell in batch.columns]
            yield pa.record_batch(cells, schema=schema)
        cursor.close()
        connection.close()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _is_opaque(kind: Any) -> bool:
    return isinstance(kind, pa.OpaqueType)
