"""What a sequence generator learns without privacy: the next item, against a Markov chain; times and behaviours.

``python -m benchmarks.sequences [--data PATH|sample] [--set KEY=VALUE ...] [--seeds N] [--minutes M] [--json]``: the
histories, or where ``generator.sequence.behaviours`` names some the events, of all owners' users are pooled; a fifth of
the users is held out, a tenth of the others says when to stop, the rest teaches. Log-likelihoods are of the next item,
per place, over the newest ``max_length`` events of held-out users. Distances are between windows of as many events of
held-out users and drawn users, beside the same distance between two halves of the real ones.
"""

import argparse
import json
import sys
import time
from statistics import mean
from typing import cast

import numpy as np
import torch

from shared.config import Scenario, load_scenario
from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.generators.family import initial_weights, model_from
from shared.generators.sequence import SequenceModel, SequenceSpec
from shared.metrics.fidelity import fidelity, markov_log_likelihood
from shared.rng import stream, torch_stream
from simulations.generator import spec_of
from simulations.owners import build_federation

_BATCH = 64
_PATIENCE = 6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequences", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample", help="file of interactions, or sample")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of a scenario")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on: of the split and of all chance")
    parser.add_argument("--minutes", type=float, default=3.0, help="most CPU time of a training")
    parser.add_argument("--learning-rate", type=float, default=0.003, help="of Adam, falling to nearly none")
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    options = parser.parse_args()
    settings = ["generator.kind=sequence", "generator.popularity_scale=1", *options.set]
    if options.data != "sample":
        settings.append(f"data.path={json.dumps(options.data)}")
    scenario = load_scenario(None, settings)
    talk = sys.stderr if options.json else sys.stdout
    rows = []
    for seed in range(options.seeds):
        rows.append(measure(scenario, seed=seed, minutes=options.minutes, learning_rate=options.learning_rate))
        told = ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items())
        print(f"{options.data}, seed {seed}: {told}", file=talk, flush=True)
    if options.json:
        means = {name: mean(row[name] for row in rows) for name in rows[0]}
        print(json.dumps({"data": options.data, "mean": means, "seeds": rows}))


def measure(scenario: Scenario, *, seed: int, minutes: float, learning_rate: float) -> dict[str, float]:
    """Log-likelihoods of model and chain, and ratios of distances to their ceilings, on one split."""
    owners = build_federation(scenario, seed=seed).owners
    everyone = Histories.concatenate([owner.training for owner in owners])
    order = stream(seed, "sequences", "split").permutation(everyone.num_users)
    fifth, tenth = len(order) // 5, len(order) // 10
    test, valid, train = (
        everyone.select(np.sort(part)) for part in (order[:fifth], order[fifth : fifth + tenth], order[fifth + tenth :])
    )
    spec = cast(SequenceSpec, spec_of(scenario, everyone.num_items))
    started = time.process_time()
    model = _trained(spec, train, valid.newest(spec.max_length), seed=seed, minutes=minutes, rate=learning_rate)
    trained = time.process_time()
    unseen = test.newest(spec.max_length)
    ours = model.next_item_log_likelihood(unseen)
    taught = Histories.concatenate([train, valid])  # the chain chooses its own settings within these
    chain = markov_log_likelihood(taught, unseen, occurrences=spec.num_behaviours)
    users = np.repeat(np.arange(unseen.num_users), unseen.lengths())
    gains = np.bincount(users, ours - chain) / np.maximum(unseen.lengths(), 1)
    windows = _windows(test, spec.max_length, stream(seed, "sequences", "windows"))
    drawn = model.draw(windows.lengths(), generator=torch_stream(seed, "sequences", "draw"))
    found = fidelity(windows, drawn, gap_edges=spec.gap_edges, rng=stream(seed, "sequences", "fidelity"))
    return {
        "model": float(ours.mean()),
        "markov": float(chain.mean()),
        "gain_per_user": float(gains.mean()),
        "standard_error": float(gains.std(ddof=1) / np.sqrt(len(gains))),
        **{f"{name}_over_ceiling": found[name].distance / found[name].ceiling for name in found if found[name].ceiling},
        "cpu_seconds": round(trained - started, 1),
    }


def _trained(
    spec: SequenceSpec, train: Histories, valid: Histories, *, seed: int, minutes: float, rate: float
) -> SequenceModel:
    """The model of the epoch that was best on ``valid``, trained by Adam without clipping or noise."""
    model = cast(SequenceModel, model_from(spec, initial_weights(spec, seed)))
    encoded, chance = model.encode(train), Chance.seeded(seed, "sequences", "train")
    rng = stream(seed, "sequences", "order")
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    best, kept, since = -np.inf, {}, 0
    started = time.process_time()
    while since < _PATIENCE and (spent := (time.process_time() - started) / (60 * minutes)) < 1:
        adam.param_groups[0]["lr"] = rate * max(0.03, 1 - spent)
        order = rng.permutation(train.num_users)
        for start in range(0, len(order), _BATCH):
            loss = model.loss(encoded.batch(order[start : start + _BATCH]), share_done=0.0, chance=chance).mean()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        reached = float(model.next_item_log_likelihood(valid).mean())
        since += 1
        if reached > best:
            best, since = reached, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return model


def _windows(histories: Histories, size: int, rng: np.random.Generator) -> Histories:
    """``size`` events in a row of each user, from a random place on; all of them where there are fewer."""
    lengths = histories.lengths()
    first = np.floor(rng.random(len(lengths)) * (np.maximum(lengths - size, 0) + 1)).astype(np.int64)
    place = histories.places() - np.repeat(first, lengths)
    return histories.keep((place >= 0) & (place < size))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
