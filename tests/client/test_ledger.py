"""The ledger keeps every charge, whatever happens after it."""

import os
import signal
import sqlite3

import pytest

from client.store.ledger import Charge, Ledger
from shared.errors import BudgetExceeded, InputError
from shared.privacy.noise import LOCAL_NOISE, NO_NOISE
from tests.small_federation import RELEASE


def a_charge(server_round: int = 1, **changes) -> Charge:
    values = {"run_id": "r", "server_round": server_round, "release": RELEASE, "job_digest": "d", "noise": LOCAL_NOISE}
    return Charge(**{**values, **changes})


def anything(releases):
    pass


@pytest.fixture(autouse=True)
def ledger_file(tmp_path):
    Ledger.create(tmp_path / "ledger.sqlite")


def test_a_missing_ledger_is_never_begun_again(tmp_path):
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(InputError, match="never start an empty one"):
        Ledger(tmp_path / "ledger.sqlite")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_creating_a_ledger_keeps_the_one_there_is(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(a_charge(1), allow=anything)
    Ledger.create(tmp_path / "ledger.sqlite")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.charges() == (a_charge(1),)


def test_charges_survive_reopening_in_order(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(a_charge(1), allow=anything)
        ledger.commit("r", 1, zeroed_users=0)
        ledger.reserve(a_charge(2, release=None, noise=NO_NOISE), allow=anything)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.charges() == (
            a_charge(1, status="committed", zeroed_users=0),
            a_charge(2, release=None, noise=NO_NOISE),
        )
        assert ledger.releases() == (RELEASE, None)


def test_a_reserved_charge_survives_sigkill(tmp_path):
    path = tmp_path / "ledger.sqlite"
    child = os.fork()
    if child == 0:
        Ledger(path).reserve(a_charge(), allow=anything)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with Ledger(path) as ledger:
        assert ledger.charges() == (a_charge(),)


def test_what_is_not_allowed_is_not_charged(tmp_path):
    def refuse(releases):
        assert releases == (RELEASE, RELEASE)
        raise BudgetExceeded("too much")

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(a_charge(1), allow=anything)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(a_charge(2), allow=refuse)
        assert ledger.releases() == (RELEASE,)
        ledger.reserve(a_charge(3), allow=anything)  # and the refusal left no lock behind


def test_a_decision_is_made_on_a_sum_nobody_else_can_change(tmp_path):
    path = tmp_path / "ledger.sqlite"

    def write_beside(releases):
        beside = sqlite3.connect(path, timeout=0.1, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            beside.execute("BEGIN IMMEDIATE")

    with Ledger(path) as ledger:
        ledger.reserve(a_charge(), allow=write_beside)


def test_commit_marks_only_the_last_charge_of_its_round(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for _ in range(2):
            ledger.reserve(a_charge(1), allow=anything)
        ledger.reserve(a_charge(2), allow=anything)
        ledger.commit("r", 1, zeroed_users=0)
        assert [charge.status for charge in ledger.charges()] == ["reserved", "committed", "reserved"]


def test_epsilon_is_nowhere_in_the_file(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.reserve(a_charge(), allow=anything)
    columns = sqlite3.connect(tmp_path / "ledger.sqlite").execute("PRAGMA table_info(charges)").fetchall()
    assert not any("epsilon" in name for _, name, *_ in columns)


def test_a_file_that_is_no_ledger_is_refused_with_advice(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(InputError, match="never start an empty one for the same data"):
        Ledger(tmp_path / "ledger.sqlite")
