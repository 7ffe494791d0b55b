"""Show what an owner's ledger cost, what may come next, and write it down for others."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from client.policy import Policy
from client.screen import print_json, results, warn
from client.statement import Line, Run, Statement, as_number, in_short, read_statement, state_of
from shared.errors import InputError, RefusedError
from shared.files import finite, write_atomically
from shared.privacy.noise import LOCAL_NOISE
from shared.privacy.planning import MOST_RUNS, PlanPoint, affordable_runs, plan_grid

_MOST_PLANS = 400
_T = TypeVar("_T", int, float)


def show(directory: Path, *, last: int, by_round: bool, delta: float | None, as_json: bool) -> None:
    """Print the newest charges, joined to runs unless ``by_round``, and what they add up to."""
    statement = read_statement(directory, delta=delta)
    every: Sequence[Run | Line] = statement.lines if by_round else statement.runs
    shown = every[-last:] if last else every
    counts = [
        line.end if isinstance(line, Run) else place
        for place, line in enumerate(every[len(every) - len(shown) :], start=len(every) - len(shown) + 1)
    ]
    after = statement.epsilons(counts)
    if as_json:
        lines = [{**line.to_dict(), "epsilon_after": epsilon} for line, epsilon in zip(shown, after, strict=True)]
        print_json({**totals(statement), "charges" if by_round else "runs": lines})
    else:
        console = results()
        if shown:
            console.print(_charges(shown, after))
        if len(shown) < len(every):
            what = "charges" if by_round else "runs"
            console.print(f"… and {len(every) - len(shown):,} older {what}; --last 0 shows all", markup=False)
        console.print(_footer(statement), markup=False, soft_wrap=True)
    _warn(statement)


def totals(statement: Statement) -> dict[str, Any]:
    """What a ledger adds up to."""
    return {
        "data_source": statement.data_source,
        "privacy_unit": "user",
        "delta": statement.delta,
        "epsilon_spent": statement.spent,
        "epsilon_ceiling": statement.ceiling,
        "epsilon_remaining": statement.remaining,
        "num_charges": len(statement.lines),
        "num_runs": len(statement.runs),
        "not_private": statement.not_private,
        "restored_at": list(statement.restored),
        "verifies": statement.verification.ok,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A plan and what the policy says of it; ``obstacle`` is empty where it fits."""

    point: PlanPoint
    obstacle: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.point), "fits": not self.obstacle, "obstacle": self.obstacle or None}


def plan(
    directory: Path, *, rounds: str, noise: str, rate: str, local_steps: int, plot: Path | None, as_json: bool
) -> None:
    """Print the price of every combination, and how many more runs like the last one fit."""
    numbers = _numbers("--rounds", rounds, int)
    noises, rates = _numbers("--noise", noise, float), _numbers("--rate", rate, float)
    if len(numbers) * len(noises) * len(rates) > _MOST_PLANS:
        raise InputError(f"more than {_MOST_PLANS} plans at once: ask for fewer rounds, noises or rates.")
    if plot is not None:
        _check_out("--plot", plot, (".png", ".html"))
    statement = read_statement(directory)
    policy = statement.policy
    assert policy is not None  # without a delta of its own, the statement has the policy's
    if not statement.verification.ok:
        raise RefusedError(
            f"the ledger in {directory} does not verify ({statement.verification.problems[0]}), so nobody can say what"
            f" remains. Run `fedaug ledger verify --state {directory}`."
        )

    points = plan_grid(
        spent=statement.cost,
        delta=statement.delta,
        ceiling=math.inf if statement.ceiling is None else statement.ceiling,
        rounds=numbers,
        noise_multipliers=noises,
        sample_rates=rates,
        max_users=policy.max_users,
        local_steps=local_steps,
    )
    table = [Offer(point=point, obstacle=_obstacle(point, policy, local_steps)) for point in points]
    more = _more_runs(statement)
    if plot is not None:
        from client.plots import plan_page, plan_png

        page = plan_png if plot.suffix == ".png" else plan_page
        write_atomically(plot, page(points, statement=statement, verdict=_verdict(statement, more)))
    if as_json:
        values = {**totals(statement), "local_steps": local_steps, "more_runs_like_the_last": more}
        print_json(
            {**values, "plans": [offer.to_dict() for offer in table], "plot": str(plot) if plot is not None else None}
        )
    else:
        console = results()
        console.print(_plans(table))
        console.print(_footer(statement), markup=False, soft_wrap=True)
        console.print(_verdict(statement, more), markup=False, soft_wrap=True)
        if plot is not None:
            console.print(f"Plot: {plot}", markup=False, soft_wrap=True)
    _warn(statement)


def export(directory: Path, out: Path, *, delta: float | None, as_json: bool) -> None:
    """Write the statement for a privacy officer to ``out``."""
    from client.label import privacy_label, render_label

    _check_out("--out", out, (".html", ".json"))
    statement = read_statement(directory, delta=delta)
    label = privacy_label(statement, now=datetime.now(UTC))
    text = render_label(label) if out.suffix == ".html" else json.dumps(finite(label), indent=1, allow_nan=False) + "\n"
    write_atomically(out, text.encode())
    if as_json:
        print_json({"out": str(out), **totals(statement)})
    else:
        results().print(f"{label['verdict']}\nWritten to {out}", markup=False, soft_wrap=True)
    _warn(statement)


def _warn(statement: Statement) -> None:
    for text in statement.warnings:
        warn(text)


def _charges(lines: Sequence[Run | Line], after: Sequence[float]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("number", "when (UTC)", "run", "round", "released", "noise", "state"):
        table.add_column(name, overflow="fold")
    table.add_column("ε after", justify="right")
    for line, epsilon in zip(lines, after, strict=True):
        run = line if isinstance(line, Run) else Run(run_id=line.run_id, lines=(line,), end=0)
        noise = ", ".join(run.noises)
        table.add_row(
            _range(run.lines[0].number, run.lines[-1].number),
            f"{run.lines[-1].at[:10]} {run.lines[-1].at[11:16]}",
            _plain(run.run_id),
            _range(*run.rounds),
            _released(run),
            noise if noise == LOCAL_NOISE else f"[red]{noise.upper()}[/red]",
            state_of(run.lines),
            as_number(epsilon),
        )
    return table


def _released(run: Run) -> str:
    counted = [(times, in_short(release)) for release, times in Counter(run.releases).items()]
    return "; ".join(f"{times:,} × ({text})" if times > 1 else text for times, text in counted)


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def _plain(text: str) -> str:
    """A run's name for a table: no control characters, and no markup."""
    return "".join(c if c.isprintable() else "�" for c in text).replace("[", "\\[")


def _footer(statement: Statement) -> str:
    ceiling = statement.ceiling
    if ceiling is not None and not statement.spent <= ceiling:
        limit = f", ABOVE the ceiling of {ceiling:g}; nothing remains"
    elif ceiling is not None:
        limit = f" of {ceiling:g}; {as_number(statement.remaining or 0.0)} remains"
    else:
        limit = ", with no ceiling" if statement.policy else "; no policy says how much it may be"
    return (
        f"ε spent {as_number(statement.spent)}{limit}, at δ {statement.delta:g}, for each user of"
        f" {statement.data_source}: {len(statement.lines):,} charge(s) in {len(statement.runs):,} run(s)."
    )


def _plans(offers: Sequence[Offer]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("noise multiplier", "sample rate", "rounds", "batch cap", "ε alone", "ε for life after"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for offer in offers:
        point = offer.point
        table.add_row(
            f"{point.noise_multiplier:g}",
            f"{point.sample_rate:g}",
            f"{point.rounds:,}",
            f"{point.max_batch:,}",
            as_number(point.epsilon_alone),
            as_number(point.epsilon_after),
            f"[red]no: {offer.obstacle}[/red]" if offer.obstacle else "[green]yes[/green]",
        )
    return table


def _obstacle(point: PlanPoint, policy: Policy, local_steps: int) -> str:
    """Which term of the policy the plan breaks; empty for none."""
    ceilings, limits = policy.ceilings, policy.limits
    broken = {
        f"above {ceilings.epsilon} for life": not point.fits,
        f"above {ceilings.epsilon_per_run} for one run": (
            ceilings.epsilon_per_run is not None and not point.epsilon_alone <= ceilings.epsilon_per_run
        ),
        f"noise below {limits.min_noise_multiplier:g}": point.noise_multiplier < limits.min_noise_multiplier,
        f"rate above {limits.max_sample_rate:g}": point.sample_rate > limits.max_sample_rate,
        f"over {limits.max_steps_per_round:,} steps a round": local_steps > limits.max_steps_per_round,
        f"over {limits.max_steps_per_run:,} steps a run": point.rounds * local_steps > limits.max_steps_per_run,
    }
    return ", ".join(text for text, is_broken in broken.items() if is_broken)


def _more_runs(statement: Statement) -> int | None:
    """None where there is no last run, or nothing limits it."""
    if not statement.runs or statement.ceiling is None:
        return None
    last = [release for release in statement.runs[-1].releases if release is not None]
    if len(last) < len(statement.runs[-1].releases):
        return 0  # it was trained without noise
    return affordable_runs(statement.cost, last, delta=statement.delta, ceiling=statement.ceiling)


def _verdict(statement: Statement, more: int | None) -> str:
    if not statement.runs:
        return "No run was charged yet."
    last = statement.runs[-1]
    if more is None:
        return "Nothing limits how many more runs there may be: the policy has no ceiling for life."
    name = "".join(c for c in last.run_id if c.isprintable())
    many = f"at least {more:,}" if more == MOST_RUNS else f"{more:,}" if more else "no"
    return f"Like the last one ({name}, {len(last.lines):,} charge(s)), {many} more run(s) can be afforded."


def _numbers(option: str, text: str, kind: Callable[[str], _T]) -> list[_T]:
    try:
        found = list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(number > 0 and math.isfinite(number) for number in found):
        example = "10,50,100" if kind is int else "0.5,1"
        raise InputError(f"{option} takes numbers above 0 with commas between, such as {example}; not {text!r:.80}.")
    return found


def _check_out(option: str, out: Path, suffixes: tuple[str, ...]) -> None:
    if out.suffix not in suffixes:
        raise InputError(f"{option} {out}: the name must end in {' or '.join(suffixes)}, which says what to write.")
    if not out.parent.is_dir():
        raise InputError(f"{option} {out}: there is no folder {out.parent}. Create it first.")
