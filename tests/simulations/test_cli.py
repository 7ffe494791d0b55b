"""The product as a user runs it, small: one federation, its price, its files, and every kind of bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution

from simulations.cli import app, run

SMALL = [
    "--set=federation.rounds=3",
    "--set=data.num_owners=3",
    "--set=data.split=random",
    "--set=data.users_per_owner=60",
    "--set=data.top_items=150",
    "--set=generator.hidden_size=16",
    "--set=generator.latent_size=4",
    "--set=augmentation.users=300",
    "--set=study.bootstrap=50",
]


def fedaug(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simulations.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "small"
    result = fedaug("simulate", "--out", str(run), *SMALL)
    assert result.returncode == 0, result.stderr
    return run, result


def test_the_screen_says_what_it_cost_and_what_to_expect(finished):
    run, result = finished
    assert "owner-01" in result.stdout
    assert "Users × ε" in result.stdout
    assert str(run / "report.html") in result.stdout.replace("\n", "")
    assert "seeded, not private" in result.stderr


def test_the_epsilon_printed_is_that_of_the_releases(finished):
    run, result = finished
    record = json.loads((run / "run.json").read_text())
    assert len(record["owners"]) == 3
    for owner in record["owners"]:
        total = privacy_loss_distribution.identity(value_discretization_interval=1e-4)
        for release in owner["releases"]:
            step = privacy_loss_distribution.from_gaussian_mechanism(
                release["noise_multiplier"], sampling_prob=release["sample_rate"], value_discretization_interval=1e-4
            )
            total = total.compose(step.self_compose(release["num_steps"]))
        independent = total.get_epsilon_for_delta(owner["delta"])
        # The finer grid is tighter by at most 0.006 in the range we run.
        assert independent - 1e-3 <= owner["epsilon"] <= independent + 0.01
        assert sum(release["num_steps"] for release in owner["releases"]) == 3  # all rounds, not the last
        assert re.search(rf"{owner['name']}\D+\d+\D+{owner['epsilon']:.2f}\b", result.stdout)


def test_the_run_folder_holds_what_the_contract_names(finished):
    run, _ = finished
    for name in ("run.json", "study.json", "report.html", "generator/model.safetensors", "generator/card.json"):
        assert (run / name).is_file(), name
    for name in ("ledger.sqlite", "synthetic.parquet", "metrics.json"):
        assert (run / "owners" / "owner-01" / name).is_file(), name
    card = json.loads((run / "generator" / "card.json").read_text())
    assert card["exportable"] is False
    assert card["privacy"]["noise"] == "seeded, not private"
    record = json.loads((run / "run.json").read_text())
    assert record["noise"] == "seeded, not private"
    assert record["catalogue"] == "assumed public"
    study = json.loads((run / "study.json").read_text())
    assert set(study["arms"]) == {"local", "federated", "federated_no_dp", "central"}
    assert {owner["name"] for owner in study["owners"]} == {"owner-01", "owner-02", "owner-03"}


def test_the_report_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "seeded, not private" in page


def test_a_run_that_stopped_at_home_goes_on_to_the_same_end(finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    shutil.rmtree(run / "generator")
    (run / "study.json").unlink()
    result = fedaug("simulate", "--resume", str(run), "--json")
    assert result.returncode == 0, result.stderr
    before, after = (json.loads((folder / "study.json").read_text()) for folder in (finished[0], run))
    assert before["arms"] == after["arms"]
    assert (run / "generator" / "model.safetensors").read_bytes() == (
        finished[0] / "generator" / "model.safetensors"
    ).read_bytes()
    assert json.loads(result.stdout)["owners"] == json.loads((finished[0] / "run.json").read_text())["owners"]


def test_resuming_without_a_ledger_is_refused(finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    (run / "owners" / "owner-02" / "ledger.sqlite").unlink()
    result = fedaug("simulate", "--resume", str(run))
    assert (result.returncode, "never start an empty one" in result.stderr) == (2, True)


def test_resuming_with_other_data_is_refused(finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run)
    record = json.loads((run / "run.json").read_text())
    record["data_fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(record))
    result = fedaug("simulate", "--resume", str(run))
    assert (result.returncode, "have changed since the run began" in result.stderr) == (2, True)


def test_synthesize_marks_what_must_stay(finished, tmp_path):
    generator = str(finished[0] / "generator")
    out = tmp_path / "users.csv"
    result = fedaug(
        "synthesize", "--generator", generator, "--users", "20", "--out", str(out), "--format", "csv", "--json"
    )
    assert json.loads(result.stdout)["lineage"] == "internal"
    assert out.read_text().count("internal") == json.loads(result.stdout)["interactions"]


def test_a_study_compares_arms_over_seeds_and_can_be_resumed(tmp_path):
    run = tmp_path / "study"
    first = fedaug("study", "--out", str(run), *SMALL, "--set=study.seeds=2", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["seeds"] == [0, 1]
    shutil.rmtree(run / "seeds" / "seed-1")
    again = fedaug("study", "--resume", str(run), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["arms"] == json.loads(first.stdout)["arms"]


def test_dry_run_prints_the_price_and_leaves_nothing(tmp_path):
    result = fedaug("simulate", "--dry-run", "--json", *SMALL, cwd=tmp_path)
    price = json.loads(result.stdout)
    assert 7.9 < price["epsilon"] <= 8.0
    assert price["release"]["num_steps"] == 3
    assert list(tmp_path.iterdir()) == []


def test_without_privacy_is_said_loudly(tmp_path):
    result = fedaug("simulate", "--dry-run", "--set=privacy.epsilon=inf")
    assert result.returncode == 0
    assert "WITHOUT privacy" in result.stdout


GOOD = "user_id,item_id\n" + "".join(f"u{u},i{i}\n" for u in range(30) for i in range(u % 5, u % 5 + 8))


@pytest.mark.parametrize(
    ("content", "options", "advice"),
    [
        (None, [], "nowhere.csv"),
        ("", [], "empty"),
        ("who,what\n1,2\n", [], "user_id"),
        (GOOD + "u1,\n", [], "row 241"),
        (GOOD + "u0,i0\n", [], "row 241"),
        (GOOD, ["--set=data.num_owners=1"], "min_owners"),
        (GOOD, ["--set=data.num_owners=31"], "owner"),
        (GOOD, ["--set=data.nmu_owners=3"], "Extra inputs"),
        (GOOD, ["--set=privacy.epsilon=0"], "greater than 0"),
        (GOOD, ["--set=privacy.delta=1"], "less than 1"),
        (GOOD, ["--set=privacy.delta=0.5"], "Use at most"),
        (GOOD, ["--set=federation.declared_users=5000", "--set=privacy.delta=0.0002"], "well below"),  # one over them
        (GOOD, ["--set=data.catalogue=missing.csv"], "missing.csv"),
        (GOOD, ["--set=recommender.device=cuda:7"], "cuda"),
        (GOOD, ["--engine=turbo"], "inprocess"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_two(monkeypatch, capsys, tmp_path, content, options, advice):
    path = tmp_path / "nowhere.csv"
    if content is not None:
        path.write_text(content)
    arguments = [
        "simulate", "--data", str(path), "--out", str(tmp_path / "run"), "--set=data.split=random",
        "--set=data.num_owners=2", "--set=federation.rounds=1", *options,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["fedaug", *arguments])
    assert run(app) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert advice in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_catalogue_that_does_not_cover_the_data_is_named(tmp_path):
    (tmp_path / "data.csv").write_text(GOOD)
    (tmp_path / "catalogue.csv").write_text("item_id\ni0\ni1\n")
    result = fedaug(
        "simulate", "--data", str(tmp_path / "data.csv"), "--out", str(tmp_path / "run"), "--set=data.split=random",
        "--set=data.num_owners=2", f"--set=data.catalogue={tmp_path / 'catalogue.csv'}",
    )  # fmt: skip
    assert result.returncode == 2
    assert "outside_catalogue" in result.stderr


def test_a_run_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    result = fedaug("simulate", "--out", str(tmp_path))
    assert (result.returncode, "not empty" in result.stderr) == (2, True)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(scenario, *, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.commands.price", interrupt)
    monkeypatch.setattr(sys, "argv", ["fedaug", "simulate", "--dry-run"])
    assert run(app) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_bug_is_called_one(monkeypatch, capsys):
    def stumble(scenario, *, as_json):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("simulations.commands.price", stumble)
    monkeypatch.setattr(sys, "argv", ["fedaug", "simulate", "--dry-run"])
    assert run(app) == 1
    assert "this is a bug in fedaug" in capsys.readouterr().err


def test_brackets_in_a_path_are_printed_as_they_are(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["fedaug", "simulate", "--data", str(tmp_path / "[old]" / "a[/b].csv")])
    assert run(app) == 2
    assert "[old]/a[/b].csv" in capsys.readouterr().err.replace("\n", "")


def test_every_command_has_help_and_stands_in_the_documents():
    document = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    listing = fedaug("--help").stdout
    commands = re.findall(r"^[│ ]+(\w[\w-]*)  ", listing, flags=re.MULTILINE)
    assert {"simulate", "study", "synthesize"} <= set(commands)
    for command in commands:
        assert f"fedaug {command}" in document
        options = set(re.findall(r"--[a-z][a-z-]+", fedaug(command, "--help").stdout)) - {"--help"}
        assert all(f"`{option}" in document for option in options), options


def test_seconds_cover_every_phase(finished):
    phases = json.loads((finished[0] / "run.json").read_text())["seconds"]
    assert set(phases) == {"federated", "federated_no_dp", "home"}
    total = json.loads((finished[0] / "study.json").read_text())["seconds"]
    assert total == pytest.approx(sum(phases.values()), abs=0.1)


def test_resuming_takes_no_other_option(monkeypatch, capsys, finished):
    monkeypatch.setattr(sys, "argv", ["fedaug", "simulate", "--resume", str(finished[0]), "--seed", "0"])
    assert run(app) == 2
    assert "leave the other options out" in capsys.readouterr().err
