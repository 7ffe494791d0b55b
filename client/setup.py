"""Make an owner's folder: its policy, its key, its ledger."""

from pathlib import Path

from client.policy import Ceilings, DpSgd, Limits, Policy
from client.state import KEY, LEDGER
from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger


def begin_ledger(directory: Path, policy: Policy) -> None:
    """A key and a ledger for data that was never charged; what exists is left as it is.

    Raises:
        InputError: the folder cannot be written, or its key cannot be read.
    """
    path = directory / KEY
    key = OwnerKey.load(path) if path.exists() else OwnerKey.create(path)
    LifetimeLedger.create(directory / LEDGER, data_source=policy.data_source, key=key)


def simulated_policy(
    *,
    data_source: str,
    catalogue_hash: str,
    max_users: int,
    epsilon: float | None,
    delta: float,
    max_items_per_user: int = 1000,
    behaviours: tuple[str, ...] = (),
    dpsgd: DpSgd | None = None,
) -> Policy:
    """What a simulated owner allows: anything that its ceiling for life allows; None is no ceiling."""
    return Policy(
        data_source=data_source,
        catalogue_hash=catalogue_hash,
        max_users=max_users,
        max_items_per_user=max_items_per_user,
        behaviours=behaviours,
        simulated=True,
        ceilings=Ceilings(epsilon=epsilon, delta=delta),
        limits=Limits(min_noise_multiplier=1e-12, max_steps_per_round=10**6, max_steps_per_run=10**6, min_owners=1),
        dpsgd=dpsgd or DpSgd(),
    )
