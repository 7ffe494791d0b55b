"""The command line: each command parses, calls one function and prints."""

import errno
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape

from client.cli import augment, augment_table, client, ledger, synthesize
from shared.config import Scenario, load_scenario
from shared.errors import FedAugError, InputError

app = typer.Typer(
    name="fedaug",
    help="Federated augmentation for recommenders: train one private generator together, augment at home.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger, name="ledger")
app.add_typer(client, name="client")


ScenarioFile = Annotated[Path | None, typer.Argument(help="Scenario in TOML; without one the built-in sample is run.")]
DataPath = Annotated[Path | None, typer.Option("--data", help="Interactions: Parquet, CSV, SQL, RecBole or MovieLens.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder to create; default runs/COMMAND-DATE-TIME.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="First seed of every stream of chance.")]
Engine = Annotated[str | None, typer.Option("--engine", help="inprocess or flower.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, for example data.num_owners=20.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the price in epsilon; train nothing.")]
Resume = Annotated[Path | None, typer.Option("--resume", help="Go on with this run folder where it stopped.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Count and skip rows that cannot be read.")]


@app.command()
def simulate(
    scenario: ScenarioFile = None,
    data: DataPath = None,
    out: Out = None,
    seed: Seed = None,
    engine: Engine = None,
    settings: Settings = None,
    skip_bad_rows: SkipBadRows = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine: train, synthesise, recommend, and price it."""
    given = _Given(scenario, data, seed, engine, settings, skip_bad_rows)
    _run("simulate", given, out=out, resume=resume, dry_run=dry_run, as_json=as_json)


@app.command()
def study(
    scenario: ScenarioFile = None,
    data: DataPath = None,
    out: Out = None,
    seed: Seed = None,
    engine: Engine = None,
    settings: Settings = None,
    skip_bad_rows: SkipBadRows = False,
    resume: Resume = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare local, federated, federated without privacy and central training on held-out users."""
    given = _Given(scenario, data, seed, engine, settings, skip_bad_rows)
    _run("study", given, out=out, resume=resume, dry_run=dry_run, as_json=as_json)


app.command()(synthesize)
app.command()(augment)
app.command()(augment_table)


class _Given(NamedTuple):
    """The options that make a scenario."""

    path: Path | None
    data: Path | None
    seed: int | None
    engine: str | None
    settings: list[str] | None
    skip_bad_rows: bool

    def scenario(self) -> Scenario:
        overrides = list(self.settings or [])
        if self.data is not None:
            overrides.append(f"data.path={json.dumps(str(self.data))}")
        if self.engine is not None:
            overrides.append(f"federation.engine={json.dumps(self.engine)}")
        if self.skip_bad_rows:
            overrides.append("data.skip_bad_rows=true")
        return load_scenario(self.path, overrides, seed=self.seed)


def _run(
    command: Literal["simulate", "study"],
    given: _Given,
    *,
    out: Path | None,
    resume: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from simulations import commands  # torch and Flower take seconds; --help should not

    if resume is not None:
        if out is not None or dry_run or any(value is not None and value is not False for value in given):
            raise InputError("--resume goes on with the run's own scenario; leave the other options out.")
        commands.resume(resume, as_json=as_json)
    elif dry_run:
        commands.price(given.scenario(), as_json=as_json)
    elif command == "simulate":
        commands.simulate(given.scenario(), _run_folder(out, command), as_json=as_json)
    else:
        commands.study(given.scenario(), _run_folder(out, command), as_json=as_json)


def _run_folder(out: Path | None, command: str) -> Path:
    folder = out or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} exists and is not empty. Choose another --out, or go on with that run:"
            f" fedaug {command} --resume {folder}"
        )
    return folder


_INTERRUPTED = 130


def main() -> None:
    """Entry point of ``fedaug``: our own errors become one message and their exit code."""
    sys.exit(run(app))


def run(command: Callable[..., Any]) -> int:
    """Call ``command`` on the process arguments and return the exit code of docs/cli.md."""
    try:
        code = command(standalone_mode=False)  # what its parser means to exit with, or None
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except FedAugError as error:
        return _fail(str(error), error.exit_code)
    except typer.Exit as request:
        return request.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped. Go on later with --resume RUN.", _INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _bug(error)
        where = f" {error.filename}" if error.filename else ""
        advice = "Mend that path, make room, or choose another --out; a started run goes on with --resume RUN."
        return _fail(f"cannot use{where}: {error.strerror or error}. {advice}", 2)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the parser knows how to print itself
        if callable(show):
            show()
            return 2
        return _bug(error)


def _bug(error: Exception) -> int:
    traceback.print_exception(error)
    return _fail(f"this is a bug in fedaug, not in your input: {type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "exit_code": code}))
    Console(stderr=True, highlight=False).print(f"[red]fedaug:[/red] {escape(message)}", soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
