"""An owner killed anywhere in its work: what it spent is never less than what it released."""

import os
import random
import signal
import time
from dataclasses import replace

import dp_accounting
import pytest
import torch
from dp_accounting import pld

from client.owner import Owner
from client.policy import Policy
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.privacy.running import RunningCost
from tests.client.test_owner import deployed, owner  # noqa: F401  # fixtures
from tests.small_federation import DELTA, RELEASE, a_job, policy_of

TRIALS = 20


def test_a_real_owner_killed_at_random_never_under_counts(deployed, tmp_path):  # noqa: F811
    policy = Policy.load(deployed.directory)
    policy.model_copy(update={"ceilings": policy.ceilings.model_copy(update={"epsilon": 1e6})}).save(deployed.directory)
    deployed.answer(a_job(1, noise_seed=None, run_id="warm-up"))
    rng, released = random.Random(5), tmp_path / "released"
    for trial in range(TRIALS):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                for server_round in (1, 2, 3):
                    deployed.record(a_job(server_round, noise_seed=None, run_id=f"run-{trial}"))
                    with released.open("a") as file:
                        file.write("x")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with LifetimeLedger(deployed.directory / "ledger.sqlite") as ledger:
            spent = len(ledger.releases())
        assert spent >= 1 + (len(released.read_text()) if released.exists() else 0)
        assert verify(deployed.directory / "ledger.sqlite").ok
    deployed.answer(a_job(1, noise_seed=None, run_id="afterwards"))  # and it goes on


def test_three_runs_and_a_restart_cost_what_an_accountant_of_all_releases_says(owner):  # noqa: F811
    policy_of(1000.0).save(owner.directory)
    other = replace(RELEASE, noise_multiplier=2.0)
    for run_id, release in (("a", RELEASE), ("b", other), ("c", RELEASE)):
        restarted = Owner(name=owner.name, directory=owner.directory, simulated=True)
        for server_round in (1, 2, 3):
            job = a_job(server_round, run_id=run_id)
            restarted.answer(replace(job, plan=replace(job.plan, release=release)))
    with LifetimeLedger(owner.directory / "ledger.sqlite") as ledger:
        cost = RunningCost()
        for release in ledger.releases():
            cost.add(release)
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for noise_multiplier, num_rounds in ((1.0, 6), (2.0, 3)):
        step = dp_accounting.PoissonSampledDpEvent(0.3, dp_accounting.GaussianDpEvent(noise_multiplier))
        accountant.compose(step, 2 * num_rounds)
    joint = accountant.get_epsilon(DELTA)
    # Ours lies on a coarser grid, rounded up: above the joint price, and by less than a hundredth.
    assert joint - 1e-6 <= cost.epsilon(DELTA) <= joint + 0.01
    assert cost.epsilon(DELTA) == pytest.approx(joint, rel=1e-3)
