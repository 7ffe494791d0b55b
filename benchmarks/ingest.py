"""Measure how fast, and in how much memory, interactions become histories.

    python -m benchmarks.ingest [--rows N] [--json]

Generates N rows (10 million by default; 200,000 users, 50,000 items, a few very popular) as Parquet and as CSV in a
temporary folder, then reads and indexes each in a process of its own. Goal: under 60 s and 4 GiB on 2 cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

from shared.config import Columns
from shared.data.catalogue import catalogue_from
from shared.data.indexing import index_users
from shared.data.readers import read_interactions


def generate(path: Path, num_rows: int) -> None:
    options = "FORMAT parquet" if path.suffix == ".parquet" else "FORMAT csv, HEADER"
    duckdb.sql(
        f"""
        COPY (
            SELECT CAST(hash(i) % 200000 AS BIGINT) AS user_id,
                   CAST(floor(50000 * pow((hash(i, 1) % 1000003) / 1000003, 3)) AS BIGINT) AS item_id,
                   CAST(1500000000 + hash(i, 2) % 200000000 AS BIGINT) AS timestamp,
                   CAST(1 + hash(i, 3) % 5 AS FLOAT) AS rating
            FROM range({num_rows}) AS rows(i)
        ) TO '{path}' ({options})
        """
    )


def measure(path: Path) -> dict[str, float | int | str]:
    """Seconds and peak resident memory of this process, which must have done nothing else."""
    started = time.perf_counter()
    interactions = read_interactions(path, columns=Columns())
    read = time.perf_counter()
    catalogue = catalogue_from(interactions, top_items=None)
    users = index_users(interactions, catalogue, min_interactions=5, max_items_per_user=200, outside_catalogue="refuse")
    indexed = time.perf_counter()
    return {
        "format": path.suffix[1:],
        "rows": interactions.num_rows,
        "users": users.histories.num_users,
        "read_seconds": round(read - started, 2),
        "index_seconds": round(indexed - read, 2),
        "seconds": round(indexed - started, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory to read and index interactions.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("parquet", "csv"):
            path = Path(folder) / f"interactions.{suffix}"
            generate(path, options.rows)
            command = [sys.executable, "-m", "benchmarks.ingest", "--measure", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            path.unlink()
    cores = len(os.sched_getaffinity(0))
    if options.json:
        print(json.dumps({"cores": cores, "results": results}))
        return
    for result in results:
        print(
            f"{result['format']:8} {result['rows']:>12,} rows  read {result['read_seconds']:6.2f} s"
            f"  index {result['index_seconds']:6.2f} s  peak {result['peak_rss_mib']:,} MiB  ({cores} cores)"
        )


if __name__ == "__main__":
    main()
