"""Measure how fast, and in how much memory, a million users are drawn from a generator into a file.

    python -m benchmarks.synthesis [--users N] [--items N] [--json]

Builds a VAE with random weights and Zipf popularity, then writes its users as Parquet in a process of its own, as
`fedaug synthesize` does. Goal: a million users over 20,000 items, 50 each, under 5 minutes and 4 GiB on 2 cores.
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
from typing import Any

import numpy as np
import pyarrow.parquet

from client.synthesizing import synthesize
from shared.generators.card import GeneratorCard, save_generator
from shared.generators.family import initial_weights
from shared.generators.multvae import VaeSpec
from shared.privacy.noise import LOCAL_NOISE


def build(folder: Path, *, num_items: int, hidden_size: int) -> None:
    """A generator as training leaves it, but for what it knows: weights are random, popularity falls as Zipf's."""
    spec = VaeSpec(
        num_items=num_items,
        hidden_size=hidden_size,
        latent_size=32,
        prior="mixture",
        num_components=32,
        kl_weight=0.2,
        kl_anneal_share=0.5,
        dropout=0.0,
        popularity_scale=5.0,
    )
    weights = initial_weights(spec, 1)
    weights["to_logits.bias"] = (-np.log(np.arange(1, num_items + 1)) / spec.popularity_scale).astype(np.float32)
    card = GeneratorCard(
        spec=spec,
        catalogue={"hash": "0" * 64, "version": "benchmark", "source": "public", "num_items": num_items},
        epsilon=8.0,
        delta=1e-6,
        noise=LOCAL_NOISE,
        privacy_unit="user",
        releases={},
        max_items_per_user=1000,
    )
    save_generator(folder, weights, card, tuple(f"item-{number}" for number in range(num_items)))


def measure(folder: Path, num_users: int) -> dict[str, Any]:
    """Seconds and peak resident memory of this process, which must have done nothing else."""
    out = folder / "users.parquet"
    started, used = time.perf_counter(), time.process_time()
    done = synthesize(folder, num_users, out, form="parquet", items_per_user=50, seed=0, export=True)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    assert pyarrow.parquet.ParquetFile(out).metadata.num_rows == done["interactions"]
    return {
        "users": num_users,
        "rows": done["interactions"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "file_mib": out.stat().st_size // 2**20,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory to draw users from a generator into a file.")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.users)))
        return
    results = []
    for hidden_size in (100, 200):
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), num_items=options.items, hidden_size=hidden_size)
            command = [sys.executable, "-m", "benchmarks.synthesis", "--measure", folder, "--users", str(options.users)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            results.append({"items": options.items, "hidden_size": hidden_size, **figures})
    cores = len(os.sched_getaffinity(0))
    if options.json:
        print(json.dumps({"cores": cores, "results": results}))
        return
    for result in results:
        print(
            f"hidden {result['hidden_size']}  {result['users']:,} users  {result['rows']:,} rows"
            f"  {result['seconds']:.1f} s  peak {result['peak_rss_mib']:,} MiB  ({cores} cores)"
        )


if __name__ == "__main__":
    main()
