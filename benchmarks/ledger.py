"""Measure how fast an owner's ledger is charged and verified when it is long.

    python -m benchmarks.ledger [PART ...] [--entries N] [--json]

Goals at 100,000 entries, half of them charges: verified in under 2 s, and the next charge decided and on disk in
milliseconds. At 10,000 charges: what one more would cost in 50 ms where its kind was seen before, in 300 ms else.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.privacy.chain import Charge, Commit, Content, Reserve
from shared.privacy.noise import LOCAL_NOISE
from shared.privacy.releases import DpSgdRelease
from shared.privacy.running import RunningCost

_NUM_RELEASES = 500  # runs of 100 rounds, each calibrated to noise of its own
_AT = "2026-11-22T05:45:00Z"
_HASH = "ab" * 32
_VERSIONS = {"cryptography": "50.0.2", "fedaug": "0.1.0", "flwr": "1.42.0", "numpy": "2.3.1", "torch": "2.13.0"}


def charge(number: int) -> Charge:
    run = number // 100 % _NUM_RELEASES
    return Charge(
        run_id=f"20261122-054500-{number // 100}",
        server_round=number % 100 + 1,
        release=DpSgdRelease(
            noise_multiplier=1 + run / 7, sample_rate=0.05, num_steps=20, max_users=10_000, max_batch=700
        ),
        noise=LOCAL_NOISE,
        job_digest=_HASH,
        policy_hash=_HASH,
        code_hash=_HASH,
        versions=_VERSIONS,
        fingerprint=_HASH,
    )


def fill(path: Path, key: OwnerKey, num_entries: int) -> None:
    """Charge and commit until there are ``num_entries``, in few transactions, for each waits for the disk."""
    LifetimeLedger.create(path, data_source="benchmark", key=key)
    with LifetimeLedger(path, key=key) as ledger:
        number = 1
        while number < num_entries:
            contents: list[Content] = []
            while len(contents) < 10_000 and number < num_entries:
                release = charge(number).release
                contents.append(Reserve.of(charge(number), at=_AT))
                contents.append(Commit(reserve=number + 1, release=release, zeroed_users=0, reply_digest=_HASH, at=_AT))
                number += 2
            with ledger._writing():
                ledger._append(contents)


def measure_verify(path: Path, key: OwnerKey) -> dict[str, Any]:
    with LifetimeLedger(path) as ledger:
        receipt = ledger.receipt()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        found = verify(path, public_key=key.public, receipt=receipt)
        seconds.append(time.perf_counter() - started)
        assert found.ok, found.problems
    return {"verify_seconds": round(min(seconds), 2), "verify_seconds_worst_of_5": round(max(seconds), 2)}


def measure_reserve(path: Path, key: OwnerKey) -> dict[str, Any]:
    """One charge at a time, as an agent makes them: open, reserve and commit; each waits for the disk."""
    opened, reserved, committed = [], [], []
    for number in range(10**7, 10**7 + 50):
        asked = charge(number)
        started = time.perf_counter()
        with LifetimeLedger(path, key=key, data_source="benchmark") as ledger:
            opened.append(time.perf_counter() - started)
            started = time.perf_counter()
            entry = ledger.reserve(asked, allow=lambda spent: None)
            reserved.append(time.perf_counter() - started)
            started = time.perf_counter()
            ledger.commit(entry, executed=asked.release, zeroed_users=0, reply_digest=_HASH)
            committed.append(time.perf_counter() - started)
    return {
        "open_ms": round(1000 * statistics.median(opened), 2),
        "reserve_ms": round(1000 * statistics.median(reserved), 2),
        "commit_ms": round(1000 * statistics.median(committed), 2),
    }


def measure_chain(part: Callable[[Path, OwnerKey], dict[str, Any]], num_entries: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, key = Path(folder) / "ledger.sqlite", OwnerKey.create(Path(folder) / "key.pem")
        fill(path, key, num_entries)
        size = path.stat().st_size // 2**20
        return {"entries": num_entries, "ledger_mib": size, **part(path, key)}


def measure_cost(num_entries: int) -> dict[str, Any]:
    """What one more round would cost, on a tenth as many charges of five kinds: of a kind seen before, and of a new."""
    kinds = [_kind(noise_multiplier) for noise_multiplier in (40.0, 45.0, 50.0, 55.0, 60.0)]
    cost = RunningCost()
    began = time.perf_counter()
    for number in range(num_entries // 10):
        cost.add(kinds[number % len(kinds)])
    added = time.perf_counter() - began
    cost.epsilon(1e-6)
    seen = [_milliseconds(partial(cost.epsilon_with, [kinds[turn % 5]], 1e-6)) for turn in range(15)]
    new = [_milliseconds(partial(cost.epsilon_with, [_kind(41.0 + turn / 10)], 1e-6)) for turn in range(15)]
    return {
        "entries": num_entries // 10,
        "add_all_ms": round(1e3 * added, 2),
        "seen_kind_ms": round(statistics.median(seen), 2),
        "new_kind_ms": round(statistics.median(new), 2),
    }


def _kind(noise_multiplier: float) -> DpSgdRelease:
    return DpSgdRelease(noise_multiplier=noise_multiplier, sample_rate=0.2, num_steps=1, max_users=1500, max_batch=400)


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "verify": partial(measure_chain, measure_verify),
    "reserve": partial(measure_chain, measure_reserve),
    "cost": measure_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to verify a long ledger and to charge to it.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    results = {name: PARTS[name](options.entries) for name in options.parts or PARTS}
    cores = len(os.sched_getaffinity(0))
    if options.json:
        print(json.dumps({"cores": cores, "results": results}))
        return
    for name, figures in results.items():
        print(f"{name:8} {'  '.join(f'{figure} {value:,}' for figure, value in figures.items())}  ({cores} cores)")


if __name__ == "__main__":
    main()
