"""An owner's commands: each parses, calls one function and prints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# What they call is imported in them: pricing stands on libraries that take seconds, and --help should not.

ledger = typer.Typer(help="Read, check, plan and keep an owner's ledger of privacy spent.", no_args_is_help=True)
client = typer.Typer(help="Decide as an owner: which runs may use its data.", no_args_is_help=True)

State = Annotated[
    Path,
    typer.Option("--state", help="Folder of the owner: policy.toml, ledger.sqlite, owner.key; or RUN/owners/NAME."),
]
Delta = Annotated[
    float | None, typer.Option("--delta", help="Where no policy can be read: read epsilon at this delta.")
]
By = Annotated[str | None, typer.Option("--by", help="Who decides; default: the user of this session.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
GeneratorFolder = Annotated[Path, typer.Option("--generator", help="Generator folder, such as RUN/generator.")]
OwnData = Annotated[Path, typer.Option("--data", help="The owner's interactions: Parquet, CSV or RecBole.")]
ItemsPerUser = Annotated[
    int, typer.Option("--items-per-user", min=1, help="Public mean length, where the generator tells no lengths.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of fresh randomness; it protects nobody.")]
Export = Annotated[bool, typer.Option("--export", help="The rows are to leave: refuse if any of them must not.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Count and skip rows that cannot be read.")]


class Form(StrEnum):
    """Formats that rows are written in."""

    parquet = "parquet"
    csv = "csv"
    recbole = "recbole"


class TableForm(StrEnum):
    """Formats of plain tables."""

    parquet = "parquet"
    csv = "csv"


class Mode(StrEnum):
    """What is put beside real rows."""

    new_users = "new-users"
    tail = "tail"
    densify = "densify"
    operators = "operators"


FileForm = Annotated[Form, typer.Option("--format", help="Format of the file.")]


@ledger.command("show")
def show(
    state: State,
    last: Annotated[int, typer.Option("--last", min=0, help="Show so many lines, the newest; 0 for all.")] = 20,
    rounds: Annotated[bool, typer.Option("--rounds", help="One line for each round, not for each run.")] = False,
    delta: Delta = None,
    as_json: Json = False,
) -> None:
    """Show what was charged, what it cost, and what remains."""
    from client import commands

    commands.show(state, last=last, by_round=rounds, delta=delta, as_json=as_json)


@ledger.command("verify")
def verify(
    state: State,
    receipt: Annotated[Path | None, typer.Option("--receipt", help="A receipt that the owner gave out.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Owner's public key, in hex; default: owner.key's.")] = None,
    as_json: Json = False,
) -> None:
    """Check that nothing in the ledger was changed, dropped or moved; exit code 3 if anything was."""
    from client import upkeep

    if not upkeep.verify_ledger(state, receipt=receipt, key=key, as_json=as_json):
        raise typer.Exit(3)


@ledger.command("plan")
def plan(
    state: State,
    rounds: Annotated[str, typer.Option("--rounds", help="Rounds of a run, by comma.")] = "10,50,100",
    noise: Annotated[str, typer.Option("--noise", help="Noise multipliers, by comma.")] = "0.5,1,2",
    rate: Annotated[str, typer.Option("--rate", help="Sample rates, by comma.")] = "0.05,0.2",
    local_steps: Annotated[int, typer.Option("--local-steps", min=1, help="Optimizer steps in a round.")] = 1,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw epsilon against rounds: FILE.png or .html.")] = None,
    as_json: Json = False,
) -> None:
    """Price runs that could come next, and say how many more the budget holds."""
    from client import commands

    commands.plan(state, rounds=rounds, noise=noise, rate=rate, local_steps=local_steps, plot=plot, as_json=as_json)


@ledger.command("export")
def export(
    state: State,
    out: Annotated[Path, typer.Option("--out", help="File to write: .html or .json.")],
    delta: Delta = None,
    as_json: Json = False,
) -> None:
    """Write a statement for a privacy officer, in plain language, without a private figure."""
    from client import commands

    commands.export(state, out, delta=delta, as_json=as_json)


@ledger.command("receipt")
def receipt(
    state: State,
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file as well.")] = None,
    as_json: Json = False,
) -> None:
    """Print the signed word on where the ledger stands; always as one JSON object."""
    from client import upkeep

    upkeep.print_receipt(state, out)


@ledger.command("backup")
def backup(
    state: State,
    out: Annotated[Path, typer.Option("--out", help="File to write; one that exists is left as it is.")],
    as_json: Json = False,
) -> None:
    """Copy the ledger into one file, also while the agent runs."""
    from client import upkeep

    upkeep.back_up(state, out, as_json=as_json)


@ledger.command("restore")
def restore(
    state: State,
    source: Annotated[Path, typer.Option("--from", help="Backup to read; it is left as it is.")],
    as_json: Json = False,
) -> None:
    """Bring back what a backup knows; what counts as spent never becomes less."""
    from client import upkeep

    upkeep.restore(state, source, as_json=as_json)


@client.command("approve")
def approve(
    state: State,
    run: Annotated[str | None, typer.Argument(help="Name of the run; without one, runs are listed.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts.")] = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """List the runs that servers proposed, or approve one on exactly the terms shown."""
    from client import decisions

    if run is None:
        decisions.list_proposals(state, as_json=as_json)
    else:
        decisions.approve_run(state, run, yes=yes, by=by, as_json=as_json)


@client.command("withdraw")
def withdraw(
    state: State,
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    by: By = None,
    as_json: Json = False,
) -> None:
    """Let a run go no further, whoever approved it; what it was given, it keeps."""
    from client import decisions

    decisions.withdraw_run(state, run, by=by, as_json=as_json)


@client.command("status")
def status(
    state: State,
    last: Annotated[int, typer.Option("--last", min=0, help="Lines of the security log to show.")] = 5,
    as_json: Json = False,
) -> None:
    """Show the policy in short, what is spent and left, open proposals and the newest lines of the log."""
    from client import decisions

    decisions.status(state, last=last, as_json=as_json)


def synthesize(
    generator: GeneratorFolder,
    users: Annotated[int, typer.Option("--users", min=1, help="How many users to draw.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    form: FileForm = Form.parquet,
    items_per_user: ItemsPerUser = 50,
    cold: Annotated[int | None, typer.Option("--cold", min=1, help="Cold users: of 1 to so many items.")] = None,
    tail: Annotated[float, typer.Option("--tail", help="Lift rare items: 0 not at all, 1 to about equal odds.")] = 0.0,
    segment: Annotated[
        Path | None, typer.Option("--segment", help="Public file of item_id, attribute: users who favour some of it.")
    ] = None,
    attribute: Annotated[str | None, typer.Option("--attribute", help="Which items of --segment.")] = None,
    seed: Seed = 0,
    export: Export = False,
    as_json: Json = False,
) -> None:
    """Draw users from a trained generator, each row with its lineage."""
    from client import home_commands
    from shared.augmentation.synthesis import Condition

    home_commands.show_synthesize(
        generator,
        users,
        out,
        form=form.value,
        items_per_user=items_per_user,
        seed=seed,
        condition=Condition(max_length=cold, tail=tail),
        segment=home_commands.segment_of(segment, attribute),
        export=export,
        as_json=as_json,
    )


def augment(
    data: OwnData,
    generator: GeneratorFolder,
    out: Annotated[Path, typer.Option("--out", help="File to write: all rows of --data, and synthetic ones.")],
    mode: Annotated[Mode, typer.Option("--mode", help="What is added.")] = Mode.new_users,
    users: Annotated[int, typer.Option("--users", min=1, help="Synthetic users to draw.")] = 1000,
    items_per_user: ItemsPerUser = 50,
    tail: Annotated[
        float | None, typer.Option("--tail", help="Of mode tail: how far rare items are lifted; 0.5.")
    ] = None,
    operators: Annotated[
        str | None, typer.Option("--operators", help="Of mode operators, such as mask:0.2,insert:0.1.")
    ] = None,
    shorter_than: Annotated[
        int | None, typer.Option("--shorter-than", min=1, help="Of densify: whose histories grow; 10.")
    ] = None,
    added: Annotated[int | None, typer.Option("--added", min=1, help="Of densify: by how many items; 5.")] = None,
    weight: Annotated[float | None, typer.Option("--weight", help="Most synthetic ÷ real interactions.")] = None,
    max_similarity: Annotated[
        float | None,
        typer.Option("--max-similarity", help="Leave out users more like another than this (Jaccard)."),
    ] = None,
    min_lift: Annotated[
        float | None,
        typer.Option("--min-lift", help="Leave out users whose items go together less; 1 is chance."),
    ] = None,
    form: FileForm = Form.parquet,
    seed: Seed = 0,
    export: Export = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Put synthetic rows beside an owner's own, for training at home."""
    from client import home_commands
    from client.augmenting import Recipe
    from shared.augmentation.operators import Operators

    recipe = Recipe(
        mode=mode.value,
        users=users,
        items_per_user=items_per_user,
        tail=tail,
        operators=None if operators is None else Operators.parse(operators.split(",")),
        shorter_than=shorter_than,
        added=added,
        weight=weight,
        max_similarity=max_similarity,
        min_lift=min_lift,
    )
    home_commands.show_augment(
        data,
        generator,
        out,
        recipe,
        form=form.value,
        seed=seed,
        export=export,
        skip_bad_rows=skip_bad_rows,
        as_json=as_json,
    )


def augment_table(
    data: Annotated[Path, typer.Option("--data", help="Table of any columns: Parquet or CSV.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: all rows of --data, and noised ones.")],
    noise: Annotated[str, typer.Option("--noise", help="COLUMN:STDDEV or COLUMN:STDDEV:LOW, by comma.")],
    copies: Annotated[int, typer.Option("--copies", min=1, help="Noised copies of every row.")] = 1,
    form: Annotated[TableForm, typer.Option("--format", help="Format of the file.")] = TableForm.parquet,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Put noised copies beside the rows of a plain table: counts, attributes, context; augmentation, not privacy."""
    from client import home_commands

    home_commands.show_augment_table(data, out, noise, copies=copies, form=form.value, seed=seed, as_json=as_json)


@client.command("tune")
def tune(
    data: OwnData,
    generator: GeneratorFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder to write the tuned generator to.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of Adam.")] = 200,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of Adam.")] = 0.001,
    seed: Seed = 0,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Fit a received generator to the owner's own users; it is internal then, and never leaves."""
    from client import home_commands

    home_commands.tune(
        data,
        generator,
        out,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
        as_json=as_json,
    )
