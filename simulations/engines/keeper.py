"""Run a command so that nothing it started outlives whoever asked for it.

``python keeper.py FOLDER COMMAND…`` runs COMMAND in FOLDER until it ends, or until standard input
ends: which it does when the asking process closes it, and also when that process is killed. Then
every descendant is killed, by pid, and FOLDER is removed. Standard library only: it runs as a
script, in an environment that is not the project's.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_GIVE_UP_SECONDS = 10.0


def main(folder: str, command: list[str]) -> int:
    # Ctrl-C reaches the whole terminal; the asker decides what to do about it and closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopt_orphans()
    child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, start_new_session=True)
    released = threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(released,), daemon=True).start()
    while child.poll() is None and not released.wait(0.1):
        pass
    status = child.poll()
    _kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if status is None else status


def _wait_for_end_of_input(released: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    released.set()


def _adopt_orphans() -> None:
    # A daemon leaves its parent and would be lost; with this, Linux makes it our child instead.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> None:
    give_up = time.monotonic() + _GIVE_UP_SECONDS
    while (descendants := _descendants()) and time.monotonic() < give_up:
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


def _descendants() -> list[int]:
    parents = _parents()
    found: list[int] = []
    frontier = {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found.extend(frontier)
    return found


def _parents() -> dict[int, int]:
    """Parent by pid, of every process of this machine that is not a zombie."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        return {int(pid): int(parent) for pid, parent in map(str.split, listing.stdout.splitlines())}
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # "pid (name) state ppid …", where the name may hold anything, brackets too
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.parent.name)] = int(parent)
    return parents


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
