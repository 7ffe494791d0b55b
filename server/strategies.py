"""Flower's strategies, with what they remember between rounds laid open."""

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from server.plan import FederationPlan
from shared.wire.messages import JOB, WEIGHTS

# Each owner counts by a public number that the server puts here, whatever its reply says.
PUBLIC_WEIGHT = "public-weight"


def build_strategy(plan: FederationPlan) -> FedAvg:
    """The strategy of ``plan``; it samples every owner it is shown."""
    match plan.strategy:
        case "fedavg":
            strategy = FedAvg()
        case "fedavgm":
            strategy = FedAvgM(server_learning_rate=plan.server_learning_rate, server_momentum=plan.server_momentum)
        case "fedadam":
            # Flower's tau of 1e-3 expects updates of about that size; one clipped step spreads a far smaller
            # norm over every parameter, and would turn Adam into plain descent at a crawl.
            strategy = FedAdam(eta=plan.server_learning_rate, beta_1=plan.server_momentum, tau=1e-9)
        case "fedprox":
            strategy = FedProx(proximal_mu=plan.terms.proximal_mu)
    strategy.min_train_nodes = strategy.min_available_nodes = 1
    strategy.arrayrecord_key, strategy.configrecord_key, strategy.weighted_by_key = WEIGHTS, JOB, PUBLIC_WEIGHT
    return strategy


def strategy_state(strategy: FedAvg, names: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    """What ``strategy`` would lose in a restart: moments by ``moment/weight name``; empty if it has none."""
    if isinstance(strategy, FedAdam) and strategy.m_t and strategy.v_t:
        first = {f"m_t/{name}": values for name, values in strategy.m_t.items()}
        return first | {f"v_t/{name}": values for name, values in strategy.v_t.items()}
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        return {f"momentum/{name}": values for name, values in zip(names, strategy.momentum_vector, strict=True)}
    return {}


def restore(strategy: FedAvg, state: dict[str, npt.NDArray[np.float32]], names: list[str]) -> None:
    """Undo a restart: the inverse of :func:`strategy_state`."""
    if not state:
        return
    if isinstance(strategy, FedAdam):
        strategy.m_t = {name: state[f"m_t/{name}"] for name in names}
        strategy.v_t = {name: state[f"v_t/{name}"] for name in names}
    if isinstance(strategy, FedAvgM):
        strategy.momentum_vector = [state[f"momentum/{name}"] for name in names]


def to_float32(record: ArrayRecord) -> dict[str, npt.NDArray[np.float32]]:
    """An aggregate as weights; some strategies widen to float64 on the way."""
    return {name: array.numpy().astype(np.float32) for name, array in record.items()}
