"""A federation small enough for a test: three owners, twelve items, a tiny generator."""

from pathlib import Path
from typing import Any

from client.policy import Policy
from client.setup import begin_ledger, simulated_policy
from server.plan import FederationPlan
from shared.data.histories import Histories
from shared.generators.family import initial_weights
from shared.generators.multvae import VaeSpec
from shared.privacy.releases import DpSgdRelease
from shared.rng import stream
from shared.wire.messages import TrainJob
from shared.wire.plan import RoundPlan

NUM_ITEMS = 12
DELTA = 1e-3
CATALOGUE = "catalogue-of-twelve"
SPEC = VaeSpec(
    num_items=NUM_ITEMS,
    hidden_size=6,
    latent_size=3,
    prior="mixture",
    num_components=2,
    kl_weight=0.2,
    kl_anneal_share=0.5,
    dropout=0.5,
    popularity_scale=1.0,
)
RELEASE = DpSgdRelease(noise_multiplier=1.0, sample_rate=0.3, num_steps=2, max_users=40)


def terms(**changes: Any) -> RoundPlan:
    values: dict[str, Any] = {
        "server_round": 1,
        "num_rounds": 3,
        "num_owners": 3,
        "num_steps": 2,
        "sample_rate": 0.3,
        "max_users": 40,
        "max_grad_norm": 1.0,
        "learning_rate": 0.5,
        "proximal_mu": 0.0,
        "release": RELEASE,
    }
    return RoundPlan(**{**values, **changes})


def a_job(server_round: int = 1, **changes: Any) -> TrainJob:
    values: dict[str, Any] = {
        "run_id": "a-test",
        "weights": initial_weights(SPEC, 7),
        "spec": SPEC,
        "plan": terms(server_round=server_round),
        "catalogue_hash": CATALOGUE,
        "noise_seed": 7,
        "collect_metrics": False,
    }
    return TrainJob(**{**values, **changes})


def plan_for(owners: tuple[str, ...], **changes: Any) -> FederationPlan:
    values: dict[str, Any] = {
        "run_id": "a-test",
        "seed": 7,
        "spec": SPEC,
        "terms": terms(num_owners=len(owners)),
        "strategy": "fedadam",
        "server_learning_rate": 0.05,
        "server_momentum": 0.9,
        "catalogue_hash": CATALOGUE,
        "owners": owners,
        "min_owners": len(owners),
        "deadline_seconds": 300.0,
        "noise_seed": 7,
        "collect_metrics": True,
    }
    return FederationPlan(**{**values, **changes})


def prepare(
    run_dir: Path,
    *,
    num_owners: int = 3,
    epsilon: float | None = 1000.0,
    **changes: Any,
) -> FederationPlan:
    """Write a run folder as the driver does, and return its plan."""
    names = tuple(f"owner-{number:03d}" for number in range(1, num_owners + 1))
    for name in names:
        folder = run_dir / "owners" / name
        folder.mkdir(parents=True)
        small_histories(name).save(folder / "train.npz")
        policy = policy_of(epsilon, data_source=name)
        policy.save(folder)
        begin_ledger(folder, policy)
    plan = plan_for(names, **changes)
    plan.save(run_dir)
    return plan


def policy_of(epsilon: float | None, *, data_source: str = "owner-001", catalogue_hash: str = CATALOGUE) -> Policy:
    return simulated_policy(
        data_source=data_source, catalogue_hash=catalogue_hash, max_users=40, epsilon=epsilon, delta=DELTA
    )


def small_histories(name: str, num_users: int = 30) -> Histories:
    rng = stream(3, "histories", name)
    return Histories.from_rows([rng.choice(NUM_ITEMS, size=5, replace=False) for _ in range(num_users)], NUM_ITEMS)
