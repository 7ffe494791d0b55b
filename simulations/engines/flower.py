"""A federation in Flower's simulation, with its helper processes kept on a short lead."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from server.checkpoints import read_state
from shared.errors import FedAugError, InputError, RefusedError

_CONNECTION = "fedaug"
_START_SECONDS = 120.0
_ASK_EVERY_SECONDS = 15.0
_ENDED = "finished:"
_COMPLETED = "finished:completed"
_SOURCES = ("server", "client", "shared")


def run_flower(run_dir: Path, *, num_owners: int, report: Callable[[], None]) -> None:
    """Run the rounds through ``flwr run``, and leave no process behind.

    A Ray cluster named by ``RAY_ADDRESS`` is used and left running; otherwise Ray starts and ends
    with the run. The log is ``run_dir/logs/flower.log``.

    Args:
        report: called several times a second while the run goes on.
    Raises:
        FedAugError: the run did not complete; names the log. Of the server's own kind where it said why.
    """
    log_path = run_dir / "logs" / "flower.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    (run_dir / "failure.json").unlink(missing_ok=True)
    # Ray puts sockets under this folder, and a socket's path may be no longer than 107 bytes.
    work = Path(tempfile.mkdtemp(prefix="fedaug-", dir="/tmp" if Path("/tmp").is_dir() else None))
    try:
        with log_path.open("ab") as log:
            flower = _Flower(work, _stage(work / "app"), log)
            with flower.superlink():
                run_id = flower.start(run_dir, num_owners=num_owners)
                status = flower.wait(run_id, report=report, server_ended=lambda: _server_ended(run_dir))
                flower.keep_log(run_id)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if status != _COMPLETED:
        raise _failure(run_dir, status, log_path)


def _failure(run_dir: Path, status: str, log_path: Path) -> FedAugError:
    try:
        failure = json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _Stopped(f"Flower ended the run with status {status!r} before a result; its log is {log_path}.")
    kinds: dict[int, type[FedAugError]] = {2: InputError, 3: RefusedError}
    return kinds.get(failure["exit_code"], _Stopped)(f"{failure['text']}\nThe log is {log_path}.")


def _server_ended(run_dir: Path) -> bool:
    state = read_state(run_dir)
    return bool(state and state["server_round"] == state["num_rounds"]) or (run_dir / "failure.json").exists()


class _Stopped(FedAugError):
    """The engine stopped for a reason that is not the user's input."""

    exit_code = 1


def _stage(folder: Path) -> Path:
    """Copy the app to ``folder``: ``flwr run`` may rewrite the project file it is given, and must not find ours."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise InputError(
            f"the flower engine ships the source to its workers, and {root} is not a checkout of it. Install with"
            " `pip install --editable`, or use --engine inprocess."
        )
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(root / name, folder / name)
    for name in _SOURCES:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


class _Flower:
    """Flower's programs, in a folder and an environment of their own.

    The folder holds no package of ours: Ray puts the place a program was started in before the
    app on every worker's path, and would run what it finds there.
    """

    def __init__(self, work: Path, app: Path, log: IO[bytes]) -> None:
        self._work, self._app, self._log = work, app, log
        self._port = _free_port()
        self._environment = _environment(work)
        self._superlink: subprocess.Popen[bytes] | None = None
        (work / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )

    @contextmanager
    def superlink(self) -> Iterator[None]:
        """A SuperLink of our own, on this machine only, that ends with the block or with this process."""
        command = [
            *(sys.executable, str(Path(__file__).with_name("keeper.py")), str(self._work)),
            *(_program("flower-superlink"), "--simulation", "--insecure", "--isolation", "subprocess"),
            *("--host", "127.0.0.1", "--port", str(self._port), "--disable-runtime-dependency-installation"),
        ]
        self._superlink = subprocess.Popen(
            command,
            cwd=self._work,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._wait_until_up()
            yield
        finally:
            assert self._superlink.stdin is not None
            self._superlink.stdin.close()
            self._superlink.wait()

    def start(self, run_dir: Path, *, num_owners: int) -> str:
        """Submit the run; returns Flower's number for it."""
        run_config = self._work / "run.toml"
        run_config.write_text(f"run-dir = {json.dumps(str(run_dir))}\n", encoding="utf-8")
        federation = (
            f"num-supernodes={num_owners} client-resources-num-cpus=1 client-resources-num-gpus=0.0"
            " init-args-log-to-driver=true"
        )
        answer = self._ask("run", str(self._app), _CONNECTION, "-c", str(run_config), "--federation-config", federation)
        if not answer.get("run-id"):
            raise _Stopped(f"Flower did not start the run: {answer or 'no answer'}; its log is {self._log.name}.")
        return str(answer["run-id"])

    def wait(self, run_id: str, *, report: Callable[[], None], server_ended: Callable[[], bool]) -> str:
        """Flower's status of the run once it ended; `flwr run` itself exits 0 for a failed one."""
        ask_at = time.monotonic() + _ASK_EVERY_SECONDS
        while True:
            report()
            if self._superlink is None or self._superlink.poll() is not None:
                return "superlink ended"
            # Asking costs seconds of a processor that the owners need.
            if time.monotonic() >= ask_at or server_ended():
                status = self._status(run_id)
                if status.startswith(_ENDED):
                    return status
                ask_at = time.monotonic() + _ASK_EVERY_SECONDS
            time.sleep(0.2)

    def keep_log(self, run_id: str) -> None:
        """Append what server and owners printed, which the SuperLink would take with it."""
        self._call("log", run_id, _CONNECTION, "--show", stdout=self._log)

    def _status(self, run_id: str) -> str:
        runs = self._ask("list", _CONNECTION, "--run-id", run_id).get("runs") or [{}]
        return str(runs[0].get("status", "unknown"))

    def _ask(self, command: str, *arguments: str) -> dict[str, Any]:
        done = self._call(command, *arguments, "--format", "json", stdout=subprocess.PIPE)
        text = done.stdout.decode(errors="replace")
        try:
            return dict(json.loads(text[text.index("{") :]))  # warnings may come before the object
        except ValueError:
            self._log.write(done.stdout)
            return {}

    def _call(self, *arguments: str, stdout: IO[bytes] | int) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [_program("flwr"), *arguments],
            cwd=self._work,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=self._log,
            timeout=_START_SECONDS,
            check=False,
        )

    def _wait_until_up(self) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while time.monotonic() < give_up and self._superlink is not None and self._superlink.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.1)
        raise _Stopped(f"Flower's SuperLink did not come up on port {self._port}; its log is {self._log.name}.")


def _environment(work: Path) -> dict[str, str]:
    ours = {
        "FLWR_HOME": str(work),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Flower's programs start each other by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if "RAY_ADDRESS" not in os.environ:
        ours["RAY_TMPDIR"] = str(work)
    # A path of the caller's could hold packages named like ours; the workers run what was shipped.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ours


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
