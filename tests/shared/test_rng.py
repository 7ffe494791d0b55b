"""Named streams: repeatable, and apart from each other."""

import numpy as np
import torch

from shared.rng import stream, torch_stream


def test_a_name_gives_the_same_stream_and_another_name_another():
    draws = [stream(7, *names).random(8) for names in (("a", 1), ("a", 1), ("a", "1"), ("a1",), ("b", 1))]
    assert np.array_equal(draws[0], draws[1])
    assert len({tuple(draw) for draw in draws}) == 4
    assert not np.array_equal(stream(8, "a", 1).random(8), draws[0])


def test_torch_streams_follow_the_same_rule():
    first, again, other = (torch.rand(8, generator=torch_stream(3, name)) for name in ("x", "x", "y"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
