"""What DP-SGD costs beside training without privacy: time and memory of one optimizer step.

``python -m benchmarks.dpsgd [--json] [--only vae,opacus,sequence,memory] [--seconds 60]``: generated histories, fused
Adam, one thread (on a GPU where there is one, as many as it likes). Every variant is one step of one model on one
batch; the variants of a group take turns in one process, and a ratio is the median of the ratios of each turn. Time is
that of the CPU (on a GPU: of the wall, between synchronisations). Memory is the peak of a process of its own for each
variant, over what its imports and its compiled noise kernel took. ``dense`` is the textbook model without privacy, on
a dense multi-hot batch; ``sparse`` is the product's model without privacy, on the same sparse batch as the private
``bookkeeping``, ``ghost`` and ``hooks``; ``opacus ghost`` and ``opacus hooks`` are the textbook model as Opacus trains
it, with its own noise.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional as F

from shared.dpsgd.bags import Bags
from shared.dpsgd.chance import Chance
from shared.dpsgd.engines import build_engine
from shared.dpsgd.layers import GRU
from shared.generators.family import initial_weights, model_from
from shared.generators.multvae import MultVAE, VaeSpec
from shared.privacy.releases import DpSgdRelease
from shared.rng import stream

Step = Callable[[], None]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_STEPS = 10_000  # more than any run takes
VAE_SIZES = ((3_706, 256, 600), (20_000, 256, 600), (100_000, 512, 600))
PLACES, VOCABULARY, WIDTH, GRU_SIZE = 50, 3_707, 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpsgd", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one object on the last line")
    parser.add_argument("--only", default="vae,opacus,sequence,memory", help="groups to measure, with commas")
    parser.add_argument("--seconds", type=float, default=60.0, help="of turns for each group, at least 5 turns")
    parser.add_argument("--memory-of", nargs=4, metavar=("VARIANT", "ITEMS", "BATCH", "HIDDEN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    if options.memory_of:
        variant, *sizes = options.memory_of
        print(_peak_mib(variant, *map(int, sizes)))
        return
    chosen, talk = set(options.only.split(",")), sys.stderr if options.json else sys.stdout
    measured: dict[str, Any] = {"device": _device(), "torch": torch.__version__}
    for name, group in _groups(chosen):
        measured[name] = group(options.seconds)
        print(f"{name}\n  {_told(measured[name])}", file=talk, flush=True)
    if options.json:
        print(json.dumps(measured))


def _groups(chosen: set[str]) -> list[tuple[str, Callable[[float], dict[str, Any]]]]:
    groups: list[tuple[str, Callable[[float], dict[str, Any]]]] = []
    for num_items, batch, hidden in VAE_SIZES:
        name = f"vae {num_items} items, batch {batch}, hidden {hidden}"
        # At 100,000 items the dense batch alone would fill the memory of the machine.
        variants = ["dense", "sparse", "bookkeeping"] if num_items < 100_000 else ["sparse", "bookkeeping"]
        if "vae" in chosen:
            groups.append((name, partial(_race, variants, partial(_vae_step, num_items, batch, hidden))))
        if "memory" in chosen:
            groups.append((f"memory of {name}", partial(_memory, variants, num_items, batch, hidden)))
    num_items, _, hidden = VAE_SIZES[0]
    ghosts = ["bookkeeping", "ghost", "opacus ghost"]
    for variants, batch in ((ghosts, 256), ([*ghosts, "hooks", "opacus hooks"], 64)):
        if "opacus" in chosen:
            name = f"opacus on vae {num_items} items, batch {batch}, hidden {hidden}"
            groups.append((name, partial(_race, variants, partial(_vae_step, num_items, batch, hidden))))
    for name, step in (("transformer", _transformer_step), ("gru", _gru_step)):
        if "sequence" in chosen:
            groups.append((f"{name} {PLACES} places, batch 256", partial(_race, ["plain", "bookkeeping"], step)))
    return groups


def _race(variants: list[str], make: Callable[[str], Step], seconds: float) -> dict[str, Any]:
    """Let ``variants`` take turns; milliseconds of each, and the last's and others' ratios to those before them."""
    steps = {variant: make(variant) for variant in variants}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    began = time.monotonic()
    while len(times[variants[0]]) < 5 or (time.monotonic() - began < seconds and len(times[variants[0]]) < 200):
        for variant, step in steps.items():
            times[variant].append(_seconds_of(step))
    ratios = {}
    for later in range(1, len(variants)):
        for earlier in range(later):
            one, other = variants[later], variants[earlier]
            each = [a / b for a, b in zip(times[one], times[other], strict=True)]
            ratios[f"{one} / {other}"] = round(median(each), 3)
    milliseconds = {variant: round(1e3 * median(values), 2) for variant, values in times.items()}
    return {"turns": len(times[variants[0]]), "milliseconds": milliseconds, "ratios": ratios}


def _seconds_of(step: Step) -> float:
    if DEVICE.type == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _memory(variants: list[str], num_items: int, batch: int, hidden: int, _: float) -> dict[str, Any]:
    peaks = {}
    for variant in variants:
        command = [sys.executable, "-m", "benchmarks.dpsgd", "--memory-of", variant]
        told = subprocess.run([*command, str(num_items), str(batch), str(hidden)], check=True, capture_output=True)
        peaks[variant] = round(float(told.stdout), 1)
    base = variants[0]
    ratios = {f"{variant} / {base}": round(peaks[variant] / peaks[base], 3) for variant in variants[1:]}
    return {"peak_mib": peaks, "ratios": ratios}


def _peak_mib(variant: str, num_items: int, batch: int, hidden: int) -> float:
    histories = _histories(num_items, batch)
    if DEVICE.type == "cuda":
        step = _vae_step(num_items, batch, hidden, variant, histories)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return float(torch.cuda.max_memory_allocated() / 2**20)
    # Loading the compiled kernel of the noise is paid once per process, as imports are.
    Chance.secret().fill_normal(torch.empty(2), stddev=1.0)
    before = _high_water_kib()
    step = _vae_step(num_items, batch, hidden, variant, histories)
    for _ in range(3):
        step()
    return (_high_water_kib() - before) / 1024


def _high_water_kib() -> int:
    # Not getrusage's: that one begins with the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _private(variant: str, model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> Callable[..., Tensor]:
    release = DpSgdRelease(noise_multiplier=1.0, sample_rate=0.05, num_steps=NUM_STEPS, max_users=20 * batch)
    chance = Chance.secret()
    return build_engine(variant, model, optimizer, release, max_grad_norm=1.0, chance=chance).step  # type: ignore[arg-type]


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def _vae_step(num_items: int, batch: int, hidden: int, variant: str, histories: Bags | None = None) -> Step:
    spec = VaeSpec(
        num_items=num_items,
        hidden_size=hidden,
        latent_size=200,
        prior="gaussian",
        num_components=1,
        kl_weight=0.2,
        kl_anneal_share=0.0,
        dropout=0.0,
        popularity_scale=1.0,
    )
    histories = _histories(num_items, batch) if histories is None else histories
    drawing = torch.Generator(DEVICE).manual_seed(0)
    if variant == "dense":
        dense = _DenseVAE(num_items, hidden, 200).to(DEVICE)
        multi_hot = torch.zeros(batch, num_items)
        multi_hot[histories.users, histories.items] = 1.0
        return _plain_step(dense, lambda: dense.loss(multi_hot.to(DEVICE), drawing))
    if variant.startswith("opacus"):
        dense = _DenseVAE(num_items, hidden, 200).to(DEVICE)
        multi_hot = torch.zeros(batch, num_items)
        multi_hot[histories.users, histories.items] = 1.0
        return _opacus_step(variant, dense, lambda: dense.loss(multi_hot.to(DEVICE), drawing), batch)
    # Not drawn, as drawing 120 million weights would be the peak of memory.
    model = (MultVAE(spec) if num_items >= 100_000 else model_from(spec, initial_weights(spec, 0))).to(DEVICE)
    histories = histories.to(DEVICE)
    losses = partial(model.loss, share_done=1.0, chance=Chance.secret())
    if variant == "sparse":
        return _plain_step(model, lambda: losses(histories))
    take = _private(variant, model, _adam(model), batch)
    return lambda: _nothing(take(histories, losses))


def _plain_step(model: nn.Module, losses: Callable[[], Tensor]) -> Step:
    optimizer = _adam(model)

    def step() -> None:
        optimizer.zero_grad()
        losses().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _opacus_step(variant: str, model: nn.Module, losses: Callable[[], Tensor], batch: int) -> Step:
    terms = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": batch}
    if variant == "opacus hooks":
        hooked = GradSampleModule(model, loss_reduction="mean")
        optimizer = DPOptimizer(_adam(model), **terms)
    else:
        hooked = GradSampleModuleFastGradientClipping(model, loss_reduction="mean", max_grad_norm=1.0)
        optimizer = DPOptimizerFastGradientClipping(_adam(model), **terms)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if variant == "opacus hooks":
            losses().mean().backward()  # type: ignore[no-untyped-call]
        else:
            DPTensorFastGradientClipping(hooked, optimizer, losses(), "mean").backward()
        optimizer.step()

    return step


def _transformer_step(variant: str) -> Step:
    return _sequence_step(_Transformer().to(DEVICE), variant)


def _gru_step(variant: str) -> Step:
    return _sequence_step(_Recurrent().to(DEVICE), variant)


def _sequence_step(model: nn.Module, variant: str) -> Step:
    ids = torch.from_numpy(stream(0, "sequences").integers(1, VOCABULARY, (256, PLACES + 1))).to(DEVICE)

    def losses(users: Tensor) -> Tensor:
        logits = model(users[:, :-1])
        each = F.cross_entropy(logits.reshape(-1, VOCABULARY), users[:, 1:].reshape(-1), reduction="none")
        return each.view(len(users), PLACES).mean(1)

    if variant == "plain":
        return _plain_step(model, lambda: losses(ids))
    take = _private(variant, model, _adam(model), len(ids))
    return lambda: _nothing(take(ids, losses))


def _nothing(_: object) -> None:
    pass


class _DenseVAE(nn.Module):
    """The model of Liang et al. 2018, as it is written in textbooks."""

    def __init__(self, num_items: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder, self.to_latent = nn.Linear(num_items, hidden), nn.Linear(hidden, 2 * latent)
        self.decoder, self.to_logits = nn.Linear(latent, hidden), nn.Linear(hidden, num_items)

    def loss(self, multi_hot: Tensor, drawing: torch.Generator) -> Tensor:
        hidden = torch.tanh(self.encoder(F.normalize(multi_hot)))
        mean, log_variance = self.to_latent(hidden).chunk(2, dim=1)
        drawn = torch.randn(mean.shape, generator=drawing, device=mean.device)
        latent = mean + torch.exp(0.5 * log_variance) * drawn
        logits = self.to_logits(torch.tanh(self.decoder(latent)))
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).sum(1)
        losses: Tensor = 0.2 * divergence - (torch.log_softmax(logits, dim=1) * multi_hot).sum(1)
        return losses


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.gather = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        users, places, _ = values.shape
        heads = self.attend(self.first_norm(values)).view(users, places, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        values = values + self.gather(mixed.transpose(1, 2).reshape(users, places, WIDTH))
        narrowed: Tensor = self.narrow(F.gelu(self.widen(self.second_norm(values))))
        return values + narrowed


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        values = self.items(ids) + self.places(torch.arange(PLACES, device=ids.device).repeat(len(ids), 1))
        for block in self.blocks:
            values = block(values)
        logits: Tensor = self.head(self.norm(values))
        return logits


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.states = nn.Embedding(VOCABULARY, WIDTH), GRU(WIDTH, GRU_SIZE)
        self.head = nn.Linear(GRU_SIZE, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.states(self.items(ids)))
        return logits


def _histories(num_items: int, batch: int) -> Bags:
    """About 100 items per user, some far more, with a long tail of items."""
    rng = stream(0, "dpsgd-benchmark", num_items)
    popularity = 1.0 / (np.arange(num_items) + 20.0)
    lengths = np.clip(rng.lognormal(np.log(100) - 0.3, 0.8, batch), 5, num_items // 4).astype(np.int64)
    rows = [np.unique(rng.choice(num_items, length, p=popularity / popularity.sum())) for length in lengths]
    lengths = np.array([len(row) for row in rows])
    return Bags(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.cumsum(lengths) - lengths))


def _told(measured: dict[str, Any]) -> str:
    values = measured.get("milliseconds") or measured["peak_mib"]
    unit = "ms" if "milliseconds" in measured else "MiB"
    parts = [f"{name} {value:g} {unit}" for name, value in values.items()]
    return ", ".join([*parts, *(f"{name} = {value:.2f}" for name, value in measured["ratios"].items())])


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
