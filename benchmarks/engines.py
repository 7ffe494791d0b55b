"""Seconds per round and memory of both engines, at several numbers of owners.

``python -m benchmarks.engines [--owners 8,100] [--rounds 4] [--json]``: generated histories, a
small generator, every engine in a process of its own. Memory is the peak of the proportional set
size (shared pages counted once) summed over that process and all it started.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from client.setup import begin_ledger, simulated_policy
from server.checkpoints import read_state
from server.plan import FederationPlan
from shared.data.histories import Histories
from shared.generators.multvae import VaeSpec
from shared.privacy.releases import DpSgdRelease
from shared.rng import stream
from shared.wire.plan import RoundPlan
from simulations.engines import run_federation

NUM_ITEMS, USERS_PER_OWNER, ITEMS_PER_USER = 2000, 100, 30
ENGINES = ("inprocess", "flower")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__.splitlines()[0])
    parser.add_argument("--owners", default="8,100", help="numbers of owners, with commas")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        engine, run_dir = options.one
        num_owners = len(list(Path(run_dir).glob("owners/*")))
        run_federation(Path(run_dir), engine=engine, num_owners=num_owners, progress=lambda *told: None)
        return
    talk = sys.stderr if options.json else sys.stdout
    sizes = []
    for num_owners in map(int, options.owners.split(",")):
        measured = {engine: _measure(engine, num_owners, options.rounds) for engine in ENGINES}
        ratio = measured["flower"]["seconds_per_round"] / measured["inprocess"]["seconds_per_round"]
        sizes.append({"num_owners": num_owners, **measured, "flower_over_inprocess": round(ratio, 2)})
        for engine, numbers in measured.items():
            print(f"{num_owners:4d} owners, {engine:9s}: {_told(numbers)}", file=talk)
        print(f"{num_owners:4d} owners: a round takes {ratio:.2f} times as long in flower", file=talk)
    if options.json:
        told = {"num_items": NUM_ITEMS, "users_per_owner": USERS_PER_OWNER, "rounds": options.rounds}
        print(json.dumps({**told, "sizes": sizes}))


def _told(numbers: dict[str, float]) -> str:
    return (
        f"{numbers['seconds_per_round']:.2f} s per round (first {numbers['first_round_seconds']:.2f} s),"
        f" {numbers['outside_rounds_seconds']:.1f} s outside rounds, {numbers['peak_pss_mib']:.0f} MiB"
    )


def _measure(engine: str, num_owners: int, num_rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="fedaug-benchmark-") as folder:
        run_dir = Path(folder)
        _prepare(run_dir, num_owners, num_rounds)
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.engines", "--one", engine, folder])
        peak = 0
        while process.poll() is None:
            peak = max(peak, _pss_bytes(process.pid))
            time.sleep(0.5)
        total = time.monotonic() - started
        if process.returncode:
            raise SystemExit(f"{engine} with {num_owners} owners ended with {process.returncode}")
        seconds = [figures["seconds"] for figures in read_state(run_dir)["rounds"]]
    return {
        # The first round pays for imports and caches; what follows is what a longer run costs.
        "seconds_per_round": round(median(seconds[1:] or seconds), 3),
        "first_round_seconds": seconds[0],
        "outside_rounds_seconds": round(total - sum(seconds), 1),
        "peak_pss_mib": round(peak / 2**20, 1),
    }


def _prepare(run_dir: Path, num_owners: int, num_rounds: int) -> None:
    names = tuple(f"owner-{number:03d}" for number in range(1, num_owners + 1))
    popularity = 1.0 / np.arange(1, NUM_ITEMS + 1)
    for name in names:
        rng = stream(0, "benchmark", name)
        drawn = [
            rng.choice(NUM_ITEMS, ITEMS_PER_USER, replace=False, p=popularity / popularity.sum())
            for _ in range(USERS_PER_OWNER)
        ]
        directory = run_dir / "owners" / name
        directory.mkdir(parents=True)
        Histories.from_rows(drawn, NUM_ITEMS).save(directory / "train.npz")
        policy = simulated_policy(
            data_source=name, catalogue_hash="benchmark", max_users=USERS_PER_OWNER, epsilon=100.0, delta=1e-5
        )
        policy.save(directory)
        begin_ledger(directory, policy)
    release = DpSgdRelease(noise_multiplier=1.0, sample_rate=0.2, num_steps=1, max_users=USERS_PER_OWNER)
    FederationPlan(
        run_id="benchmark",
        seed=0,
        spec=VaeSpec(
            num_items=NUM_ITEMS,
            hidden_size=200,
            latent_size=64,
            prior="mixture",
            num_components=32,
            kl_weight=0.2,
            kl_anneal_share=0.5,
            dropout=0.5,
            popularity_scale=1.0,
        ),
        terms=RoundPlan(
            server_round=1,
            num_rounds=num_rounds,
            num_owners=num_owners,
            num_steps=release.num_steps,
            sample_rate=release.sample_rate,
            max_users=release.max_users,
            max_grad_norm=1.0,
            learning_rate=1.0,
            proximal_mu=0.0,
            release=release,
        ),
        strategy="fedadam",
        server_learning_rate=0.01,
        server_momentum=0.9,
        catalogue_hash="benchmark",
        owners=names,
        min_owners=num_owners,
        deadline_seconds=300.0,
        noise_seed=0,
        collect_metrics=True,
    ).save(run_dir)


def _pss_bytes(root: int) -> int:
    """Proportional set size of ``root`` and all its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    tree: set[int] = set()
    frontier = {root}
    while frontier:
        tree |= frontier
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
    return sum(map(_pss_of, tree))


def _pss_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
