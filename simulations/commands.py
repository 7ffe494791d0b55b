"""What each command of the command line does, and the screen it leaves."""

from pathlib import Path
from typing import Any

from rich.console import Console

from client.screen import print_json
from shared.augmentation.weighting import regime
from shared.config import Scenario
from shared.files import write_atomically, write_json
from simulations.outcomes import SeedOutcome
from simulations.owners import build_federation
from simulations.pricing import price_of
from simulations.report import render_report
from simulations.run import FinishedRun, prepare, read_run, run_seed, start_run
from simulations.study import arms_table, collect, owners_table, verdict
from simulations.talk import Talk


def simulate(scenario: Scenario, run_dir: Path, *, as_json: bool) -> None:
    """Run one seed in ``run_dir`` and show what it cost and brought."""
    with Talk(quiet=as_json) as talk:
        prepared = prepare(scenario, talk=talk)
        start_run(scenario, run_dir, command="simulate")
        finished = run_seed(prepared, run_dir, talk=talk)
    _show_simulation(scenario, run_dir, finished, as_json=as_json)


def study(scenario: Scenario, run_dir: Path, *, as_json: bool) -> None:
    """Run every seed of a study in ``run_dir`` and compare the arms."""
    with Talk(quiet=as_json) as talk:
        prepare(scenario, talk=Talk(quiet=True))  # bad input ends here, before anything is written
        start_run(scenario, run_dir, command="study")
        finished = _run_seeds(scenario, run_dir, talk=talk)
    _show_study(scenario, run_dir, finished, as_json=as_json)


def resume(run_dir: Path, *, as_json: bool) -> None:
    """Go on with a run or a study where it stopped."""
    scenario, record = read_run(run_dir)
    with Talk(quiet=as_json) as talk:
        if record.get("command") == "study":
            finished = _run_seeds(scenario, run_dir, talk=talk)
        else:
            finished = [run_seed(prepare(scenario, talk=talk), run_dir, talk=talk)]
    if record.get("command") == "study":
        _show_study(scenario, run_dir, finished, as_json=as_json)
    else:
        _show_simulation(scenario, run_dir, finished[0], as_json=as_json)


def price(scenario: Scenario, *, as_json: bool) -> None:
    """Show what a run would cost in epsilon; train nothing."""
    found = price_of(scenario, build_federation(scenario, seed=scenario.seed))
    name, sentence = regime(found.users_times_epsilon, found.num_owners)
    if as_json:
        print_json({**found.to_dict(), "regime": name})
        return
    console = Console(highlight=False)
    if not found.is_private:
        console.print("epsilon: infinite. The generator would be trained WITHOUT privacy.", soft_wrap=True)
    else:
        console.print(
            f"epsilon {found.epsilon:.3f} at delta {found.delta:.3g}, for each user of each owner\n"
            + "".join(f"  {part}\n" for part in found.in_words())
            + f"  declared users {found.declared_users} ({found.sources['declared_users']}),"
            f" at most {found.max_users} at one owner ({found.sources['max_users']})",
            soft_wrap=True,
        )
    console.print(sentence, soft_wrap=True)


def _run_seeds(scenario: Scenario, run_dir: Path, *, talk: Talk) -> list[FinishedRun]:
    finished: list[FinishedRun] = []
    for number in range(scenario.study.seeds):
        seed = scenario.seed + number
        talk.say(f"Seed {seed} ({number + 1} of {scenario.study.seeds})")
        folder = run_dir / "seeds" / f"seed-{seed}"
        found = _finished_seed(folder)
        if found is None:
            one = scenario.model_copy(update={"seed": seed})
            prepared = prepare(one, talk=talk)
            if not (folder / "run.json").exists():
                start_run(one, folder, command="simulate")
            found = run_seed(prepared, folder, talk=talk)
            found.outcome.save(folder / "outcome.json")
        finished.append(found)
    of_study = {
        "command": "study",
        "scenario": scenario.model_dump(mode="json"),
        # The owners above are those of the first seed; every seed has ledgers of its own.
        "seeds": [{"seed": one.outcome.seed, "owners": one.run["owners"]} for one in finished],
    }
    write_json(run_dir / "run.json", {**finished[0].run, **of_study})
    return finished


def _show_simulation(scenario: Scenario, run_dir: Path, finished: FinishedRun, *, as_json: bool) -> None:
    result = _results(scenario, run_dir, [finished])
    if as_json:
        print_json({**finished.run, "study": result, "out": str(run_dir)})
        return
    console = Console(highlight=False)
    console.print(owners_table(result))
    _closing(console, result, finished.run, run_dir)


def _show_study(scenario: Scenario, run_dir: Path, finished: list[FinishedRun], *, as_json: bool) -> None:
    result = _results(scenario, run_dir, finished)
    if as_json:
        print_json({**result, "out": str(run_dir)})
        return
    console = Console(highlight=False)
    console.print(arms_table(result))
    console.print(owners_table(result))
    _closing(console, result, finished[0].run, run_dir)


def _finished_seed(folder: Path) -> FinishedRun | None:
    """A seed that ended before the study was stopped, or None."""
    if not (folder / "outcome.json").exists():
        return None
    return FinishedRun(SeedOutcome.load(folder / "outcome.json"), read_run(folder)[1])


def _results(scenario: Scenario, run_dir: Path, finished: list[FinishedRun]) -> dict[str, Any]:
    """Write study.json and report.html; return the former."""
    run = read_run(run_dir)[1]
    result = collect(
        [one.outcome for one in finished],
        metric=scenario.study.metric,
        epsilon=float(run["public_numbers"]["epsilon"]),
        delta=run["public_numbers"]["delta"],
        num_resamples=scenario.study.bootstrap,
        peak_rss_mib=max(one.run["peak_rss_mib"] for one in finished),
    )
    write_json(run_dir / "study.json", result)
    write_atomically(run_dir / "report.html", render_report(result, run).encode())
    return result


def _closing(console: Console, result: dict[str, Any], run: dict[str, Any], run_dir: Path) -> None:
    console.print(verdict(result), soft_wrap=True)
    console.print(run["regime"]["sentence"], soft_wrap=True)
    console.print(f"Report: {run_dir / 'report.html'}", soft_wrap=True, markup=False)
