"""A causal model of what users do next: the item, the behaviour, the time until then."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.data.histories import Histories
from shared.dpsgd.chance import Chance
from shared.dpsgd.layers import ScaledBiasLinear
from shared.errors import InputError
from shared.generators.base import GeneratorModel, IntArray, Spec
from shared.generators.sequence_events import EncodedEvents, Events
from shared.generators.sequence_likelihood import Taken, next_item_log_likelihood
from shared.generators.sequence_networks import CausalRecurrent, CausalTransformer, Drop, Past

FloatArray = npt.NDArray[np.float64]

# Users are drawn together: few enough for their logits to stay in a core's cache, and for what they have taken to fit.
_TAKEN_AT_ONCE = 1 << 24
_USERS_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec(Spec):
    """Sizes, vocabularies and loss of a :class:`SequenceModel`.

    Args:
        num_behaviours: ways to interact, of a public list; 1 where they are not told apart.
        architecture: ``num_heads`` concerns the transformer alone.
        max_length: events in a row that a training step shows of a user, and that the next one is drawn from.
        gap_edges: where buckets of the time between two events end, in seconds, rising; the last bucket takes all
            longer times. Empty: time is not modelled.
        dropout: share of the numbers between layers that a training step leaves out.
        popularity_scale: how much of a clipped gradient the items' popularity takes.
    """

    kind: ClassVar[str] = "sequence"
    WHOLE: ClassVar[Mapping[str, int]] = {
        "num_behaviours": 127,
        "size": 4096,
        "num_layers": 32,
        "num_heads": 64,
        "max_length": 10_000,
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {"dropout": (0.0, 0.99), "popularity_scale": (0.0, 1000.0)}
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"architecture": ("transformer", "gru")}

    num_behaviours: int
    architecture: str
    size: int
    num_layers: int
    num_heads: int
    max_length: int
    gap_edges: tuple[int, ...]
    dropout: float
    popularity_scale: float

    def __post_init__(self) -> None:
        Spec.__post_init__(self)
        if self.size % self.num_heads:
            raise InputError(
                f"generator spec: size {self.size} cannot be shared by num_heads {self.num_heads}. Use a multiple."
            )
        edges = self.gap_edges
        whole = isinstance(edges, tuple) and all(isinstance(e, int) and not isinstance(e, bool) for e in edges)
        rising = whole and all(low < high for low, high in zip((0, *edges), edges, strict=False))
        if not rising or len(edges) > _MOST_EDGES or max(edges, default=0) > _LONGEST_GAP:
            raise InputError(
                f"generator spec: gap_edges must be up to {_MOST_EDGES} rising whole seconds from 1 to {_LONGEST_GAP},"
                f" not {edges!r:.200}"
            )


_MOST_EDGES = 1000
_LONGEST_GAP = 10_000_000_000  # three centuries; sums of many still fit int64


class SequenceModel(GeneratorModel):
    """Reads a user's events in order and gives each next one a probability: of its item, then of its behaviour given
    the item, then of the bucket of the time before it given both.

    A pair of item and behaviour happens at most once in a sequence, and the probabilities know it; how likely an item
    is to happen again in another behaviour is learnt apart. The first place is
    predicted from a start token, so a user is drawn from nothing. Input and output items have weights of their own,
    since DP-SGD cannot clip tied ones.
    Source: Kang & McAuley 2018, arXiv:1808.09781; Hidasi et al. 2016, arXiv:1511.06939.
    """

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size
        self.items = nn.Embedding(spec.num_items + 1, size)  # the last row is the start token
        self.network: CausalTransformer | CausalRecurrent
        if spec.architecture == "transformer":
            self.network = CausalTransformer(
                size, num_layers=spec.num_layers, num_heads=spec.num_heads, max_length=spec.max_length
            )
        else:
            self.network = CausalRecurrent(size, num_layers=spec.num_layers)
        self.norm = nn.LayerNorm(size)
        self.to_items = ScaledBiasLinear(size, spec.num_items, bias_scale=spec.popularity_scale)
        if spec.num_behaviours > 1 or spec.gap_edges:
            # Of the state and the next item together: an item unlike the last ones tells of a new visit.
            self.next_item = nn.Linear(2 * size, size)
        if spec.num_behaviours > 1:
            self.behaviours = nn.Embedding(spec.num_behaviours, size)
            self.to_behaviours = nn.Linear(size, spec.num_behaviours)
            # Added to the logit of each item already taken: what is bought is rarely returned, however popular.
            self.again = nn.Linear(size, 1)
        if spec.gap_edges:
            self.gaps = nn.Embedding(len(spec.gap_edges), size)
            self.to_gaps = nn.Linear(size, len(spec.gap_edges))
            self.gaps_of_behaviours = nn.Embedding(spec.num_behaviours, len(spec.gap_edges))

    def encode(self, histories: Histories) -> EncodedEvents:
        """All events of each user.

        Without behaviours all are of the first one; without timestamps the times between them are
        not trained on.

        Raises:
            InputError: an item or a behaviour lies outside the spec.
        """
        if histories.num_items != self.spec.num_items:
            raise InputError(
                f"histories of {histories.num_items} items do not fit a generator of {self.spec.num_items}. Index them"
                " by the public catalogue that the generator was planned with."
            )
        if histories.behaviours is not None:
            # Left out and not refused: whether there are any is a matter of single users.
            histories = histories.keep(histories.behaviours < self.spec.num_behaviours)
        return EncodedEvents(histories, histories.gap_buckets(self.spec.gap_edges))

    def loss(self, users: Events, *, share_done: float, chance: Chance) -> Tensor:
        """Each user's negative log-likelihood per event, shape ``(num_users,)``.

        Of a longer user a window of ``max_length`` events counts, drawn anew in each step: the gradient of one user is
        clipped either way, and what came before the newest events is learnt from too.
        """
        users = users.window(self.spec.max_length, chance)

        def drop(values: Tensor) -> Tensor:
            kept = torch.from_numpy(chance.uniform(values.numel()) >= self.spec.dropout).view(values.shape)
            dropped: Tensor = values * kept.to(values) / (1.0 - self.spec.dropout)
            return dropped

        of_items, of_rest = self._log_likelihoods(users, drop if self.spec.dropout else _keep)
        total = torch.where(users.inside, of_items + of_rest, 0.0).sum(1)
        return -total / users.lengths.clamp(min=1)

    @torch.no_grad()
    def next_item_log_likelihood(self, histories: Histories, *, users_at_once: int = 64) -> FloatArray:
        """Log-probability of each item given the events before it, shape ``(num_interactions,)``.

        Nothing is dropped. What stands beyond the first ``max_length`` events of a user is refused by a transformer:
        give :meth:`Histories.newest`.
        """
        encoded, parts = self.encode(histories), [np.empty(0)]
        for start in range(0, histories.num_users, users_at_once):
            users = encoded.batch(np.arange(start, min(start + users_at_once, histories.num_users)))
            users = users.to(self.to_items.weight.device)
            of_items, _ = self._log_likelihoods(users, _keep)
            parts.append(of_items[users.inside].double().cpu().numpy())
        return np.concatenate(parts)

    def _log_likelihoods(self, users: Events, drop: Drop) -> tuple[Tensor, Tensor]:
        """Of each place's item, and of its behaviour and gap together; both ``(num_users, num_places)``."""
        start = users.items.new_full((len(users), 1), self.spec.num_items)
        zero = torch.zeros_like(start)
        items = self.items(torch.cat([start, users.items], dim=1))
        behaviours = torch.cat([zero, users.behaviours[:, :-1]], dim=1)
        gaps = torch.cat([zero, users.gaps[:, :-1].clamp(min=0)], dim=1)
        states = self.norm(self.network(self._events(items[:, :-1], behaviours, gaps), drop, []))
        taken = Taken.before(users, self.spec.num_behaviours)
        again = self.again(states)[:, :, 0] if self.spec.num_behaviours > 1 else None
        of_items = next_item_log_likelihood(self.to_items(states), users, taken, again)
        of_rest = torch.zeros_like(of_items)
        if self.spec.num_behaviours > 1 or self.spec.gap_edges:
            states = self._with_item(states, items[:, 1:])
        if self.spec.num_behaviours > 1:
            logits = self.to_behaviours(states).masked_fill(taken.behaviours, -torch.inf)
            of_rest = of_rest + _chosen(logits, users.behaviours)
        if self.spec.gap_edges:
            logits = self.to_gaps(states) + self.gaps_of_behaviours(users.behaviours)
            of_rest = of_rest + torch.where(users.gaps >= 0, _chosen(logits, users.gaps.clamp(min=0)), 0.0)
        return of_items, of_rest

    def _events(self, items: Tensor, behaviours: Tensor, gaps: Tensor) -> Tensor:
        """What the network reads of events, from their embedded items and the codes of the rest."""
        if self.spec.num_behaviours > 1:
            items = items + self.behaviours(behaviours)
        if self.spec.gap_edges:
            items = items + self.gaps(gaps)
        return items

    def _with_item(self, states: Tensor, items: Tensor) -> Tensor:
        """States that know the embedded next item."""
        return F.gelu(self.next_item(torch.cat([states, items], dim=-1)))

    @torch.no_grad()
    def draw(
        self, lengths: IntArray, *, generator: torch.Generator, tilt: npt.NDArray[np.float32] | None = None
    ) -> Histories:
        """Users event by event; see the base class.

        Behaviours are told where there are two or more. Timestamps are where time is modelled: a user begins at 0, and
        a gap is log-uniform within the bucket drawn for it. A transformer's user longer than ``max_length`` goes on
        from the newest half of its events, as a window of the training does that begins within a history.
        """
        order = np.argsort(-lengths, kind="stable")  # so that those still going are the first rows of a block
        users_at_once = max(1, min(_USERS_AT_ONCE, _TAKEN_AT_ONCE // (self.spec.num_items * self.spec.num_behaviours)))
        added = None if tilt is None else torch.from_numpy(tilt)
        blocks = [
            self._draw_block(lengths[order[start : start + users_at_once]], generator, added)
            for start in range(0, len(lengths), users_at_once)
        ]
        if not blocks:
            return Histories.from_rows([], self.spec.num_items)
        return Histories.concatenate(blocks).select(np.argsort(order))

    def _draw_block(self, lengths: IntArray, generator: torch.Generator, tilt: Tensor | None) -> Histories:
        """Users of ``lengths``, which do not rise."""
        num_users, num_places = len(lengths), int(lengths[0])
        items, behaviours, gaps = torch.zeros(3, num_users, num_places, dtype=torch.int64)
        taken = torch.zeros(num_users, self.spec.num_items, self.spec.num_behaviours, dtype=torch.bool)
        past: Past = []
        first = 0  # the oldest event that the network still sees
        for place in range(num_places):
            going = int((lengths > place).sum())
            if self.spec.architecture == "transformer" and place - first == self.spec.max_length:
                past, first = [], place - self.spec.max_length // 2
            past = [tuple(part[:going] for part in layer) for layer in past]
            seen = slice(first, place) if not past else slice(place - 1, place)
            states = self._states_after(items[:going, seen], behaviours[:going, seen], gaps[:going, seen], past)
            item, behaviour, gap = self._draw_event(states, taken[:going], generator, tilt)
            items[:going, place], behaviours[:going, place] = item, behaviour
            gaps[:going, place] = gap if place else 0  # nothing came before the first event
            taken[torch.arange(going), item, behaviour] = True
        inside = np.arange(num_places) < lengths[:, None]
        return Histories(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items.numpy()[inside].astype(np.int32),
            self.spec.num_items,
            self._times(gaps, generator)[inside] if self.spec.gap_edges else None,
            behaviours.numpy()[inside].astype(np.int8) if self.spec.num_behaviours > 1 else None,
        )

    def _states_after(self, items: Tensor, behaviours: Tensor, gaps: Tensor, past: Past) -> Tensor:
        """The state after the given events, which follow ``past``: shape ``(num_users, size)``."""
        if not past:
            zero = items.new_zeros(len(items), 1)
            items = torch.cat([zero + self.spec.num_items, items], dim=1)
            behaviours, gaps = torch.cat([zero, behaviours], dim=1), torch.cat([zero, gaps], dim=1)
            # Training does not know what came before a window, nor the time since.
            gaps[:, 1:2] = 0
        states: Tensor = self.norm(self.network(self._events(self.items(items), behaviours, gaps), _keep, past)[:, -1])
        return states

    def _draw_event(
        self, states: Tensor, taken: Tensor, generator: torch.Generator, tilt: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Item, behaviour and gap of the next event of each user, among those that can follow."""
        logits = self.to_items(states)
        if tilt is not None:
            logits = logits + tilt
        if self.spec.num_behaviours > 1:
            logits = torch.where(taken.any(2), logits + self.again(states), logits)
        item = _drawn(logits.masked_fill(taken.all(2), -torch.inf), generator)
        behaviour, gap = torch.zeros_like(item), torch.zeros_like(item)
        if self.spec.num_behaviours > 1 or self.spec.gap_edges:
            states = self._with_item(states, self.items(item))
        if self.spec.num_behaviours > 1:
            logits = self.to_behaviours(states)
            behaviour = _drawn(logits.masked_fill(taken[torch.arange(len(item)), item], -torch.inf), generator)
        if self.spec.gap_edges:
            gap = _drawn(self.to_gaps(states) + self.gaps_of_behaviours(behaviour), generator)
        return item, behaviour, gap

    def _times(self, gaps: Tensor, generator: torch.Generator) -> IntArray:
        """Seconds since each user's first event, shape ``(num_users, num_places)``."""
        edges = np.array((0, *self.spec.gap_edges))
        low, high = edges[gaps.numpy()], edges[gaps.numpy() + 1]
        share = torch.rand(gaps.shape, generator=generator, dtype=torch.float64).numpy()
        # Of one second more, since a gap may be 0; rounding must not leave the bucket.
        seconds = np.floor(np.exp(np.log1p(low) * (1 - share) + np.log1p(high) * share) - 1).astype(np.int64)
        seconds = np.clip(seconds, low, high - 1)
        seconds[:, 0] = 0
        times: IntArray = seconds.cumsum(axis=1)
        return times

    def initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape)
        if name in ("items.weight", "behaviours.weight", "gaps.weight", "network.places.weight"):
            values: Tensor = torch.randn(shape, generator=generator) * self.spec.size**-0.5
            return values
        if name == "gaps_of_behaviours.weight":
            return torch.zeros(shape)
        return super().initial(name, shape, generator)


def _keep(values: Tensor) -> Tensor:
    return values


def _chosen(logits: Tensor, codes: Tensor) -> Tensor:
    """Log-probability of ``codes``, shape ``(num_users, num_places)``."""
    return torch.log_softmax(logits, dim=2).gather(2, codes[:, :, None])[:, :, 0]


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One code for each row, in proportion to the softmax of its logits; one that stands at -inf never.

    By one uniform for each row: an exponential for each code, as torch.multinomial draws, takes four times as long.
    """
    reached = torch.softmax(logits, dim=1).cumsum(1, dtype=torch.float64)
    total = reached[:, -1:]
    point = torch.rand(total.shape, generator=generator, dtype=torch.float64) * total
    # Rounding may lift a point to the total, which no code lies beyond.
    point = point.minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, point, right=True)[:, 0]
