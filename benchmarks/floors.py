"""What a generator is worth without privacy: recommenders that only its users taught, against real and popular ones.

``python -m benchmarks.floors [--data PATH|sample] [--kind KIND] [--set KEY=VALUE ...] [--seeds N] [--json]``: all
training users of a scenario are pooled. A tenth of them only chooses the penalties of EASE, the rest teaches: the
generator, trained by Adam, whose users alone then teach one EASE (train on synthetic, test on real); another EASE; and
popularity. A statistic that a generator begins from is released exactly. Penalties are chosen from one grid; held-out
users are ranked once, at the end.

A step is the federation's with one owner: descent of the private part by its learning rate, then whatever sees no user;
Adam follows the difference of the weights, as the server's FedAdam does.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import numpy.typing as npt
import torch

from shared.augmentation.synthesis import synthesise_users
from shared.config import Scenario, load_scenario
from shared.data.histories import Histories
from shared.data.splits import show_part
from shared.dpsgd.chance import Chance
from shared.dpsgd.sampling import draw_users
from shared.generators.base import GeneratorModel, Spec, Weights
from shared.generators.beginning import begin_from
from shared.generators.family import KINDS, initial_weights, model_from
from shared.metrics.ranking import parse_metric, rank
from shared.recommenders.base import Fitted
from shared.recommenders.ease import Ease
from shared.rng import stream
from shared.sketch.release import choose_head, read_sketch
from shared.sketch.statistic import compute_sketch
from shared.sketch.terms import SketchTerms
from simulations.generator import spec_of, trains
from simulations.owners import Federation, build_federation
from simulations.pricing import price_of

L2 = (0.0003, 0.001, 0.003, 0.01, 0.03)
VALIDATION_SHARE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Users who show a part of their histories: ``fold_in`` is known, ``targets`` is asked for, row for row."""

    fold_in: Histories
    targets: Histories


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Real users in three parts that share nobody: those who teach, those who choose settings, and those who test."""

    train: Histories
    validation: Known
    test: Known
    metric: str


@dataclass(frozen=True, slots=True)
class Score:
    """Mean metric over the test users, and the penalty that was chosen without them."""

    metric: float
    l2: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample", help="file of interactions, or sample")
    parser.add_argument("--kind", choices=KINDS, default="vae")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of a scenario")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on: of the split and of all chance")
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--batch", type=int, default=256, help="users of a step on average")
    parser.add_argument("--learning-rate", type=float, default=0.003, help="of Adam")
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    talk = sys.stderr if options.json else sys.stdout
    data = [] if options.data == "sample" else [f"data.path={options.data}", "data.split=random", "data.num_owners=10"]
    scenario = load_scenario(None, [*data, f"generator.kind={options.kind}", *options.set, "privacy.epsilon=inf"])
    seeds = []
    for seed in range(options.seeds):
        measured = measure(
            scenario,
            seed=seed,
            num_steps=options.steps,
            expected_batch=options.batch,
            learning_rate=options.learning_rate,
        )
        seeds.append(measured)
        told = ", ".join(f"{name} {value:g}" for name, value in measured.items())
        print(f"{options.data}, {options.kind}, seed {seed}: {told}", file=talk)
    result = {name: mean(seed[name] for seed in seeds) for name in seeds[0]}
    print(f"{'arm':>12s} {scenario.study.metric:>9s} {'÷ real':>7s}", file=talk)
    for arm in ("synthetic", "real", "popularity"):
        print(f"{arm:>12s} {result[arm]:9.4f} {result[arm] / result['real']:7.3f}", file=talk)
    if options.json:
        print(json.dumps({"data": options.data, "kind": options.kind, "mean": result, "seeds": seeds}))


def measure(
    scenario: Scenario, *, seed: int, num_steps: int, expected_batch: int, learning_rate: float
) -> dict[str, float]:
    """The three arms on one split of the scenario's data, ratios, and the seconds that training and drawing took."""
    federation = build_federation(scenario, seed=seed)
    task = task_of(federation, scenario, seed=seed)
    started = time.monotonic()
    spec = spec_of(scenario, task.train.num_items)
    model = model_from(spec, first_weights(spec, task.train, price_of(scenario, federation).sketches, seed=seed))
    if trains(scenario.generator):
        train_without_privacy(
            model,
            task.train,
            num_steps=num_steps,
            expected_batch=expected_batch,
            learning_rate=learning_rate,
            seed=seed,
            momentum=scenario.federation.server_momentum,
            average_decay=scenario.federation.average_decay,
        )
    trained = time.monotonic()
    bound = scenario.data.max_items_per_user
    synthetic = synthesise_users(
        model,
        num_users=scenario.augmentation.users,
        items_per_user=min(scenario.augmentation.items_per_user, bound),
        max_items_per_user=bound,
        seed=seed,
    )
    drawn = time.monotonic()
    by_synthetic, by_real, popular = tstr(synthetic, task), tstr(task.train, task), popularity(task)
    return {
        "synthetic": by_synthetic.metric,
        "real": by_real.metric,
        "popularity": popular,
        "synthetic_over_real": by_synthetic.metric / by_real.metric,
        "synthetic_over_popularity": by_synthetic.metric / popular,
        "synthetic_l2": by_synthetic.l2,
        "real_l2": by_real.l2,
        "training_seconds": round(trained - started, 1),
        "drawing_seconds": round(drawn - trained, 1),
    }


def task_of(federation: Federation, scenario: Scenario, *, seed: int) -> Task:
    """Everyone's users, with a tenth of the training users taken out for choosing."""
    splits = [owner.split for owner in federation.owners]
    train = Histories.concatenate([split.train for split in splits])
    chooses = stream(seed, "floors", "validation").random(train.num_users) < VALIDATION_SHARE
    fold_in, targets = show_part(
        train.select(chooses & (train.lengths() >= 2)),
        scenario.study.fold_in_share,
        rng=stream(seed, "floors", "targets"),
    )
    return Task(
        train.select(~chooses),
        Known(fold_in, targets),
        Known(
            Histories.concatenate([split.fold_in for split in splits]),
            Histories.concatenate([split.targets for split in splits]),
        ),
        scenario.study.metric,
    )


def first_weights(spec: Spec, users: Histories, sketches: Sequence[SketchTerms], *, seed: int) -> Weights:
    """Weights to begin with: from the exact statistics that ``sketches`` ask of ``users``; from chance if none do."""
    if not sketches:
        return initial_weights(spec, seed)
    sums: list[dict[str, npt.NDArray[np.float64]]] = []
    for terms in sketches:
        head = choose_head(sums[0]["popularity"], terms.head_items) if terms.statistic == "cooccurrence" else None
        exact = compute_sketch(users, terms, head=head, chance=Chance.seeded(seed, "floors", "sketch"))
        sums.append({name: values.astype(np.float64) for name, values in exact.items()})
    return begin_from(read_sketch(sums, sketches, num_owners=1, num_items=users.num_items), spec, seed=seed)


def train_without_privacy(
    model: GeneratorModel,
    histories: Histories,
    *,
    num_steps: int,
    expected_batch: int,
    learning_rate: float,
    seed: int,
    momentum: float = 0.9,
    average_decay: float = 0.0,
) -> None:
    """Train ``model`` on all of ``histories``, without clipping or noise.

    Args:
        learning_rate: of Adam; the descent whose difference it follows has 1.
        momentum: Adam's first decay.
        average_decay: of the average of the weights, which is what remains, as the server keeps one; 0 for the last.
    """
    encoded = model.encode(histories)
    chance, sampling = Chance.seeded(seed, "floors", "latent"), Chance.seeded(seed, "floors", "sampling")
    descent = torch.optim.SGD(model.private_part.parameters(), lr=1.0)
    adam = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(momentum, 0.99))
    average = [value.detach().clone() for value in model.parameters()]
    rate = min(1.0, expected_batch / histories.num_users)
    for step in range(num_steps):
        done = step / num_steps
        before = [value.detach().clone() for value in model.parameters()]
        drawn = draw_users(
            histories.num_users, sample_rate=rate, max_batch=None, max_users=histories.num_users, chance=sampling
        )
        users = encoded.batch(drawn)
        descent.zero_grad()
        loss = model.loss(users, share_done=done, chance=chance).sum() / (rate * histories.num_users)
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step()
        model.after_step(learning_rate=1.0, share_done=done, chance=chance)
        for value, start in zip(model.parameters(), before, strict=True):
            value.grad = start - value.detach()
            value.data.copy_(start)
        adam.step()
        kept = min(average_decay, (step + 1) / (step + 10))
        for averaged, value in zip(average, model.parameters(), strict=True):
            averaged.mul_(kept).add_(value.detach(), alpha=1 - kept)
    for averaged, value in zip(average, model.parameters(), strict=True):
        value.data.copy_(averaged)


def tstr(users: Histories, task: Task, *, l2: Sequence[float] = L2) -> Score:
    """EASE taught by ``users`` alone, real or synthetic, on the test users of ``task``.

    Its penalty, a share of the interactions of ``users``, is the one of ``l2`` that serves the validation users best.
    """
    validation = {share: _mean(Ease((share,)).fit(users, seed=0), task.validation, task.metric) for share in l2}
    best = max(validation, key=lambda share: validation[share])
    return Score(_mean(Ease((best,)).fit(users, seed=0), task.test, task.metric), best)


def popularity(task: Task) -> float:
    """The metric of what most of ``task.train`` had, recommended to every test user."""
    return _mean(_Popular(task.train), task.test, task.metric)


class _Popular:
    def __init__(self, train: Histories) -> None:
        self._counts = np.asarray(train.to_csr().sum(axis=0), dtype=np.float32).ravel()

    def scores(self, fold_in: Histories) -> npt.NDArray[np.float32]:
        return np.tile(self._counts, (fold_in.num_users, 1))


def _mean(fitted: Fitted, known: Known, metric: str) -> float:
    _, k = parse_metric(metric)
    return float(rank(fitted, known.fold_in, known.targets, k=k).metric(metric).mean())


if __name__ == "__main__":
    main()
