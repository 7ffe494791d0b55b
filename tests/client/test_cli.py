"""An owner's commands as an owner runs them: on a folder with a policy, a key, a ledger and proposals."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution

import client.owner
from client import state
from client.approvals import is_approved, proposals, propose
from client.policy import Ceilings, Policy
from client.security_log import SecurityLog
from client.statement import read_statement
from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE, SEEDED_NOISE
from simulations.cli import app, run
from tests.client.lifetime_ledgers import OTHER_RELEASE, RELEASE, SOURCE, a_charge, answer, anything, tamper
from tests.client.test_approvals import a_proposal

DELTA = 1e-3
FINGERPRINT, ZEROED = "feedfacecafe", 4711


def a_folder(directory: Path, *, charges=(), **policy) -> Path:
    directory.mkdir(exist_ok=True)
    values = {"data_source": SOURCE, "catalogue_hash": "c", "max_users": 100, **policy}
    Policy(**{"ceilings": Ceilings(epsilon=8.0, delta=DELTA), **values}).save(directory)
    key = OwnerKey.create(directory / state.KEY)
    LifetimeLedger.create(directory / state.LEDGER, data_source=SOURCE, key=key)
    with LifetimeLedger(directory / state.LEDGER, key=key) as ledger:
        for charge in charges:
            charge_it(ledger, charge)
    return directory


def charge_it(ledger: LifetimeLedger, charge) -> None:
    number = ledger.reserve(charge, allow=anything)
    ledger.commit(number, executed=charge.release, zeroed_users=ZEROED, reply_digest="ab" * 32)


TWO_RUNS = [
    *(a_charge(number, run_id="first", fingerprint=FINGERPRINT) for number in (1, 2, 3)),
    *(a_charge(number, run_id="second", release=OTHER_RELEASE, fingerprint=FINGERPRINT) for number in (1, 2)),
]


@pytest.fixture
def owner(tmp_path):
    return a_folder(tmp_path / "owner", charges=TWO_RUNS)


@pytest.fixture
def fedaug(monkeypatch, capsys):
    """Run a command in this process; return its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedaug", *map(str, arguments)])
        capsys.readouterr()
        code = run(app)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def independent_epsilon(counts) -> float:
    total = privacy_loss_distribution.identity(value_discretization_interval=1e-4)
    for release, times in counts:
        step = privacy_loss_distribution.from_gaussian_mechanism(
            release.noise_multiplier, sampling_prob=release.sample_rate, value_discretization_interval=1e-4
        )
        total = total.compose(step.self_compose(release.num_steps * times))
    return total.get_epsilon_for_delta(DELTA)


def test_the_files_are_named_as_the_agent_names_them():
    assert (state.LEDGER, state.KEY) == (client.owner.LEDGER, client.owner.KEY)


def test_show_joins_runs_and_prices_them(owner, fedaug):
    code, out, _ = fedaug("ledger", "show", "--state", owner, "--json")
    shown = json.loads(out)
    assert code == 0
    assert [(line["run_id"], line["rounds"], line["num_charges"]) for line in shown["runs"]] == [
        ("first", [1, 3], 3),
        ("second", [1, 2], 2),
    ]
    first, both = (line["epsilon_after"] for line in shown["runs"])
    # A cap of 40 where 10 are expected of 100 costs nothing that could be seen.
    assert first == pytest.approx(independent_epsilon([(RELEASE, 3)]), abs=0.01)
    assert both == pytest.approx(independent_epsilon([(RELEASE, 3), (OTHER_RELEASE, 2)]), abs=0.01)
    assert shown["epsilon_spent"] == both
    assert shown["epsilon_remaining"] == pytest.approx(8 - both)
    assert (shown["privacy_unit"], shown["verifies"], shown["not_private"]) == ("user", True, {})


def test_show_for_people_says_what_remains(owner, fedaug):
    code, out, err = fedaug("ledger", "show", "--state", owner)
    out = on_one_line(out)
    spent = read_statement(owner).spent
    assert (code, err) == (0, "")
    assert "3 × (dp_sgd_poisson: noise 1.5, rate 0.1" in out
    assert f"ε spent {spent:.4g} of 8; {8 - spent:.4g} remains, at δ 0.001, for each user" in out


def test_show_by_round_and_only_the_last(owner, fedaug):
    shown = json.loads(fedaug("ledger", "show", "--state", owner, "--rounds", "--last", "2", "--json")[1])
    assert [line["number"] for line in shown["charges"]] == [8, 10]
    assert shown["charges"][0]["release"] == OTHER_RELEASE.to_dict()
    assert shown["charges"][0]["epsilon_after"] < shown["charges"][1]["epsilon_after"] == shown["epsilon_spent"]
    assert "3 older charges" in fedaug("ledger", "show", "--state", owner, "--rounds", "--last", "2")[1]


def test_what_was_never_finished_is_shown_and_counted(owner, fedaug):
    before = read_statement(owner).spent
    with LifetimeLedger(owner / state.LEDGER, key=OwnerKey.load(owner / state.KEY)) as ledger:
        ledger.reserve(a_charge(3, run_id="second"), allow=anything)
    shown = json.loads(fedaug("ledger", "show", "--state", owner, "--json")[1])
    assert shown["runs"][-1]["state"] == "2 committed, 1 reserved"
    assert shown["epsilon_spent"] > before


def test_runs_charged_in_turns_are_shown_by_their_last_charge(tmp_path, fedaug):
    turns = [a_charge(1, run_id="long"), a_charge(1, run_id="short"), a_charge(2, run_id="long")]
    shown = json.loads(fedaug("ledger", "show", "--state", a_folder(tmp_path / "o", charges=turns), "--json")[1])
    assert [line["run_id"] for line in shown["runs"]] == ["short", "long"]
    assert shown["runs"][0]["epsilon_after"] == pytest.approx(independent_epsilon([(RELEASE, 2)]), abs=0.01)


@pytest.mark.parametrize(("noise", "release"), [(SEEDED_NOISE, RELEASE), (NO_NOISE, None)])
def test_noise_that_protects_nobody_is_said_loudly(tmp_path, fedaug, noise, release):
    charges = [a_charge(1, noise=noise, release=release)]
    owner = a_folder(tmp_path / "o", charges=charges, simulated=True, ceilings=Ceilings(delta=DELTA))
    code, out, err = fedaug("ledger", "show", "--state", owner)
    assert code == 0
    assert noise.upper() in on_one_line(out)
    assert noise in err
    assert "with no ceiling" in on_one_line(out)
    page = exported(fedaug, owner, "o.html")
    assert noise in page
    assert "not protected" in page
    assert "it does NOT hold" in page


def test_delta_stands_in_for_a_policy_and_never_against_one(owner, fedaug):
    code, _, err = fedaug("ledger", "show", "--state", owner, "--delta", "0.01")
    assert (code, "Leave --delta out" in on_one_line(err)) == (2, True)
    (owner / "policy.toml").unlink()
    code, _, err = fedaug("ledger", "show", "--state", owner)
    assert (code, "--delta" in err) == (2, True)
    code, out, _ = fedaug("ledger", "show", "--state", owner, "--delta", DELTA)
    assert (code, "no policy says" in on_one_line(out)) == (0, True)


def test_a_ledger_in_order_verifies(owner, fedaug):
    code, out, err = fedaug("ledger", "verify", "--state", owner)
    assert code == 0
    assert "in order" in out
    assert "entries 11, charges 5, committed 5" in out
    assert "Only a receipt tells" in on_one_line(err)


def test_a_flipped_bit_is_found(owner, fedaug):
    tamper(owner / state.LEDGER, "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), '1.5', '9.5') AS BLOB)"
           " WHERE number = 4")  # fmt: skip
    code, out, err = fedaug("ledger", "verify", "--state", owner)
    assert code == 3
    assert "DOES NOT VERIFY" in out
    assert "entry 4: its bytes are not those that were hashed" in on_one_line(err)
    assert "ledger restore" in on_one_line(err)
    code, out, err = fedaug("ledger", "verify", "--state", owner, "--json")
    assert (code, json.loads(out)["ok"]) == (3, False)
    # Whoever does not ask is told too, and nobody is told what remains.
    assert "DOES NOT VERIFY" in fedaug("ledger", "show", "--state", owner)[2]
    assert fedaug("ledger", "plan", "--state", owner)[0] == 3
    assert "does not verify" in exported(fedaug, owner, "o.html")


def test_every_byte_of_an_entry_counts(owner, fedaug):
    path = owner / state.LEDGER
    content = bytearray(path.read_bytes())
    content[content.index(b'"run_id":"second"') + 12] ^= 1
    path.write_bytes(content)
    assert fedaug("ledger", "verify", "--state", owner)[0] == 3


def test_an_older_copy_is_found_with_a_receipt(owner, tmp_path, fedaug):
    receipt = tmp_path / "receipt.json"
    assert fedaug("ledger", "backup", "--state", owner, "--out", tmp_path / "old.sqlite")[0] == 0
    with LifetimeLedger(owner / state.LEDGER, key=OwnerKey.load(owner / state.KEY)) as ledger:
        answer(ledger, a_charge(9))
    code, out, _ = fedaug("ledger", "receipt", "--state", owner, "--out", receipt)
    assert (code, json.loads(out)) == (0, json.loads(receipt.read_text()))
    verify = ("ledger", "verify", "--state", owner)
    assert fedaug(*verify, "--receipt", receipt)[0] == 0
    shutil.copy(tmp_path / "old.sqlite", owner / state.LEDGER)
    assert fedaug(*verify)[0] == 0
    code, _, err = fedaug(*verify, "--receipt", receipt)
    assert (code, "older copy" in on_one_line(err)) == (3, True)
    receipt.write_text("[]")
    assert fedaug(*verify, "--receipt", receipt)[0] == 2


def test_another_key_does_not_verify(owner, tmp_path, fedaug):
    other = OwnerKey.create(tmp_path / "other.key").public
    code, _, err = fedaug("ledger", "verify", "--state", owner, "--key", other)
    assert (code, "not signed by the key" in on_one_line(err)) == (3, True)
    assert fedaug("ledger", "verify", "--state", owner, "--key", "abc")[0] == 2
    (owner / state.KEY).unlink()
    code, _, err = fedaug("ledger", "verify", "--state", owner)
    assert (code, "No key to check against" in on_one_line(err)) == (0, True)


PLAN = ("--rounds", "5,20", "--noise", "1.5,0.2", "--rate", "0.1")


def test_plan_prices_runs_to_come(owner, fedaug):
    code, out, _ = fedaug("ledger", "plan", "--state", owner, *PLAN, "--local-steps", "5", "--json")
    found = json.loads(out)
    assert code == 0
    plans = {(plan["noise_multiplier"], plan["rounds"]): plan for plan in found["plans"]}
    assert len(plans) == 4
    assert plans[1.5, 5]["epsilon_alone"] == pytest.approx(independent_epsilon([(RELEASE, 5)]), abs=0.01)
    assert plans[1.5, 5]["fits"]
    assert not plans[0.2, 20]["fits"]
    assert "above 8" in plans[0.2, 20]["obstacle"]
    assert "noise below 0.3" in plans[0.2, 5]["obstacle"]
    more = found["more_runs_like_the_last"]
    spent = [(RELEASE, 3), (OTHER_RELEASE, 2)]
    assert independent_epsilon([*spent, (OTHER_RELEASE, 2 * more)]) <= 8
    assert independent_epsilon([*spent, (OTHER_RELEASE, 2 * (more + 1))]) > 8 - 0.01


def test_plan_draws_a_picture_or_a_page(owner, tmp_path, fedaug):
    plan = ("ledger", "plan", "--state", owner, *PLAN)
    code, out, _ = fedaug(*plan, "--plot", tmp_path / "plan.png")
    assert (code, "Like the last one (second" in on_one_line(out)) == (0, True)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert fedaug(*plan, "--plot", tmp_path / "plan.html")[0] == 0
    assert_self_contained((tmp_path / "plan.html").read_text())
    assert fedaug(*plan, "--plot", tmp_path / "plan.bmp")[0] == 2


@pytest.mark.parametrize("rounds", ["", "0", "ten", "1,,2", "-5"])
def test_plan_takes_numbers_only(owner, fedaug, rounds):
    code, _, err = fedaug("ledger", "plan", "--state", owner, f"--rounds={rounds}")
    assert (code, "--rounds takes numbers" in on_one_line(err)) == (2, True)


def exported(fedaug, owner: Path, name: str) -> str:
    out = owner.parent / name
    code, _, err = fedaug("ledger", "export", "--state", owner, "--out", out)
    assert code == 0, err
    return out.read_text()


def assert_self_contained(page: str) -> None:
    assert "://" not in page
    assert not re.search(r"<(script|link|iframe|img)\b|\bsrc=|url\((?!#)|@import", page)


def test_export_tells_a_privacy_officer_everything_but_private_figures(owner, fedaug):
    page, label = exported(fedaug, owner, "o.html"), json.loads(exported(fedaug, owner, "o.json"))
    assert_self_contained(page)
    for text in (page, json.dumps(label)):
        assert FINGERPRINT not in text
        assert str(ZEROED) not in text
        assert "fingerprint" not in text
    spent = read_statement(owner).spent
    assert label["epsilon_spent"] == label["accountants"]["certified"] == spent
    assert label["accountants"]["rdp"] >= spent > 0
    assert label["accountants"]["prv_opacus"] == pytest.approx(spent, abs=0.03)
    assert label["ledger"]["receipt"]["head_hash"] in page
    assert f"ε = {spent:.4g} of at most 8" in page
    assert [run["run_id"] for run in label["runs"]] == ["first", "second"]
    assert [point["epsilon"] for point in label["spending"]] == sorted(point["epsilon"] for point in label["spending"])
    assert "pays k times" in page


def test_the_bound_on_guessing_is_that_of_the_two_numbers(owner):
    from client.label import _epsilon_in_words

    # Without privacy loss only delta helps the guesser: (1 + delta) / 2.
    assert "at most 50.5 % of cases" in _epsilon_in_words(0.0, 0.01)
    assert "at most 75.01 % of cases" in _epsilon_in_words(math.log(3), 1e-6)  # 75.000025, rounded up
    assert "weak" in _epsilon_in_words(8.0, 1e-6)
    assert "weak" not in _epsilon_in_words(2.0, 1e-6)


def test_no_verdict_is_better_than_the_ledger(tmp_path, fedaug):
    owner = a_folder(tmp_path / "o", charges=TWO_RUNS, ceilings=Ceilings(epsilon=0.5, delta=DELTA))
    assert "More was spent of every user than is allowed" in exported(fedaug, owner, "above.html")
    assert "ABOVE the ceiling of 0.5" in on_one_line(fedaug("ledger", "show", "--state", owner)[1])
    backup = tmp_path / "backup.sqlite"
    assert fedaug("ledger", "backup", "--state", owner, "--out", backup)[0] == 0
    (owner / state.LEDGER).unlink()
    assert fedaug("ledger", "restore", "--state", owner, "--from", backup)[0] == 0
    assert "part of the record is lost" in exported(fedaug, owner, "behind.html")


def test_export_of_nothing(tmp_path, fedaug):
    page = exported(fedaug, a_folder(tmp_path / "o"), "o.html")
    assert "Nothing was ever released" in page
    assert_self_contained(page)


def test_a_name_from_a_server_cannot_write_into_the_page(tmp_path, fedaug):
    evil = a_charge(1, run_id="<script>alert(1)</script>[red]\x1b[2J")
    owner = a_folder(tmp_path / "o", charges=[evil])
    assert_self_contained(exported(fedaug, owner, "o.html"))
    code, out, _ = fedaug("ledger", "show", "--state", owner)
    assert (code, "[red]" in out, "\x1b" in out) == (0, True, False)


def test_a_backup_brings_back_a_lost_ledger_and_says_what_may_be_missing(owner, tmp_path, fedaug):
    backup = tmp_path / "backup.sqlite"
    code, out, _ = fedaug("ledger", "backup", "--state", owner, "--out", backup, "--json")
    assert (code, json.loads(out)["reserved"]) == (0, 5)
    assert fedaug("ledger", "backup", "--state", owner, "--out", backup)[0] == 2
    spent = read_statement(owner).spent
    code, out, _ = fedaug("ledger", "restore", "--state", owner, "--from", backup)
    assert (code, "Nothing to add" in out) == (0, True)
    (owner / state.LEDGER).unlink()
    code, _, err = fedaug("ledger", "show", "--state", owner)
    assert (code, "ledger restore" in on_one_line(err)) == (2, True)
    code, out, err = fedaug("ledger", "restore", "--state", owner, "--from", backup)
    assert (code, "MAY BE BEHIND" in err) == (0, True)
    assert read_statement(owner).spent == spent
    assert "is missing" in on_one_line(fedaug("ledger", "show", "--state", owner)[2])


def test_restore_says_how_many_charges_it_raised(owner, tmp_path, fedaug):
    older, newer = tmp_path / "older.sqlite", tmp_path / "newer.sqlite"
    assert fedaug("ledger", "backup", "--state", owner, "--out", older)[0] == 0
    with LifetimeLedger(owner / state.LEDGER, key=OwnerKey.load(owner / state.KEY)) as ledger:
        answer(ledger, a_charge(9))
    assert fedaug("ledger", "backup", "--state", owner, "--out", newer)[0] == 0
    shutil.copy(older, owner / state.LEDGER)
    code, out, _ = fedaug("ledger", "restore", "--state", owner, "--from", newer, "--json")
    assert (code, json.loads(out)) == (0, {"num_raised": 1, "may_be_behind": False})
    assert read_statement(owner).lines[-1].raised
    assert fedaug("ledger", "restore", "--state", owner, "--from", tmp_path / "none")[0] == 2


@pytest.mark.parametrize("command", ["show", "verify", "plan", "export", "receipt", "backup", "restore"])
def test_what_is_missing_is_said_with_what_to_do(tmp_path, fedaug, command):
    more = {"export": ["--out", tmp_path / "o.html"], "backup": ["--out", tmp_path / "b"], "restore": ["--from", "b"]}
    call = ("ledger", command, *more.get(command, []), "--state")
    code, out, err = fedaug(*call, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "--state names an owner's folder" in on_one_line(err)
    (tmp_path / "empty").mkdir()
    code, _, err = fedaug(*call, tmp_path / "empty")
    assert code == 2
    assert ("policy" if command == "restore" else "never start an empty one") in on_one_line(err)


def test_json_prints_errors_as_one_object_too(tmp_path, fedaug):
    code, out, _ = fedaug("ledger", "show", "--state", tmp_path / "nowhere", "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


@pytest.fixture
def asked(owner):
    propose(owner, a_proposal(of_run=2.0, after=3.0))
    return owner


def test_runs_are_listed_then_approved_on_the_terms_shown(asked, fedaug):
    code, out, err = fedaug("client", "approve", "--state", asked)
    assert code == 0
    assert "'a-test'" in out
    assert "waiting" in out
    assert "client approve RUN" in on_one_line(err)
    code, out, _ = fedaug("client", "approve", "a-test", "--state", asked, "--yes", "--by", "Ada")
    (proposal,) = proposals(asked)
    assert code == 0
    assert proposal.in_words() in out
    assert "Your ceilings: 3 of 8 for life." in out
    assert is_approved(asked, proposal.terms_digest)
    assert "Ada" in (asked / "approvals" / f"{proposal.terms_digest}.json").read_text()
    assert "Approved already" in fedaug("client", "approve", "a-test", "--state", asked)[1]


@pytest.mark.parametrize(("answer_given", "approved"), [("y\n", True), ("n\n", False), ("", False)])
def test_the_owner_is_asked(asked, answer_given, approved):
    call = [sys.executable, "-m", "simulations.cli", "client", "approve", "a-test", "--state", str(asked), "--json"]
    result = subprocess.run([*call, "--by", "Ada"], input=answer_given, capture_output=True, text=True, timeout=300)
    (proposal,) = proposals(asked)
    assert is_approved(asked, proposal.terms_digest) == approved
    assert "Price: epsilon 2 for this run alone" in result.stderr
    told = json.loads(result.stdout)
    if answer_given:
        assert (result.returncode, told["approved"]) == (0, approved)
    else:
        assert (result.returncode, "--yes" in told["error"]) == (2, True)


def test_terms_that_change_are_shown_before_they_are_approved(asked, fedaug):
    assert fedaug("client", "approve", "a-test", "--state", asked, "--yes", "--by", "Ada")[0] == 0
    (old,) = proposals(asked)
    propose(asked, replace(old, plan=replace(old.plan, learning_rate=0.25)))
    assert "waiting" in fedaug("client", "approve", "--state", asked)[1]
    assert "Approved." in fedaug("client", "approve", "a-test", "--state", asked, "--yes", "--by", "Ada")[1]
    assert not is_approved(asked, old.terms_digest)


def test_a_run_over_the_ceiling_is_called_so(owner, fedaug):
    propose(owner, a_proposal(of_run=20.0, after=21.0))
    out = fedaug("client", "approve", "a-test", "--state", owner, "--yes", "--by", "Ada")[1]
    assert "21 of 8 for life, which is TOO MUCH" in out


def test_a_run_is_withdrawn(asked, fedaug):
    assert fedaug("client", "approve", "a-test", "--state", asked, "--yes", "--by", "Ada")[0] == 0
    (proposal,) = proposals(asked)
    code, out, err = fedaug("client", "withdraw", "a-test", "--state", asked, "--by", "Ada")
    assert (code, "withdrawn" in out, err) == (0, True, "")
    assert not is_approved(asked, proposal.terms_digest)
    code, out, err = fedaug("client", "withdraw", "a-tset", "--state", asked, "--by", "Ada", "--json")
    assert (code, json.loads(out)["known"]) == (0, False)
    assert "check the name" in on_one_line(err)


def test_an_unknown_run_is_not_approved(asked, fedaug):
    code, _, err = fedaug("client", "approve", "b-test", "--state", asked, "--yes", "--by", "Ada")
    assert (code, "lists those that were" in on_one_line(err)) == (2, True)


def test_status_in_one_look(asked, fedaug):
    SecurityLog(asked).write("decision", run="'a-test'", decision="refused", rule="noise-floor")
    code, out, _ = fedaug("client", "status", "--state", asked)
    spent = read_statement(asked).spent
    assert code == 0
    for text in (SOURCE, f"epsilon {spent:.4g} of 8 for life", "never", "'a-test'", "rule noise-floor"):
        assert text in on_one_line(out)
    found = json.loads(fedaug("client", "status", "--state", asked, "--last", "1", "--json")[1])
    assert found["epsilon_spent"] == spent
    assert [proposal["run_id"] for proposal in found["open_proposals"]] == ["a-test"]
    assert [line["rule"] for line in found["log"]] == ["noise-floor"]


def test_every_command_has_help_and_stands_in_the_documents():
    document = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    groups = {group.name: group.typer_instance for group in app.registered_groups}
    assert {"ledger", "client"} <= set(groups)
    for name in ("ledger", "client"):
        commands = groups[name].registered_commands
        assert commands
        for command in commands:
            assert command.callback.__doc__
            assert f"fedaug {name} {command.name}" in document
            listing = fedaug_help(name, command.name)
            options = set(re.findall(r"--[a-z][a-z-]+", listing)) - {"--help"}
            assert options
            assert all(f"`{option}" in document for option in options), options


def fedaug_help(*arguments: str) -> str:
    call = [sys.executable, "-m", "simulations.cli", *arguments, "--help"]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout


def test_help_waits_for_no_library():
    heavy = {"torch", "opacus", "matplotlib", "flwr"}
    program = f"import sys, simulations.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_ten_thousand_entries_are_read_in_seconds(tmp_path):
    owner = a_folder(tmp_path / "o")
    with LifetimeLedger(owner / state.LEDGER, key=OwnerKey.load(owner / state.KEY)) as ledger, ledger._writing():
        from shared.privacy.chain import Reserve

        for number in range(5_000):
            release = replace(RELEASE, noise_multiplier=50 + number // 100)
            charge = a_charge(number % 100 + 1, run_id=f"run-{number // 100}", release=release)
            ledger._append([Reserve.of(charge, at="2026-11-22T05:45:00Z")])
    began = datetime.now(UTC)
    statement = read_statement(owner)
    assert len(statement.epsilons([run.end for run in statement.runs[-20:]])) == 20
    assert (datetime.now(UTC) - began).total_seconds() < 20  # about 3 alone on a machine
    assert statement.lines[0].noise == LOCAL_NOISE
