"""A checkpoint is whole or it is not there."""

import json

import numpy as np
import pytest

from server.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from shared.errors import InputError


def a_checkpoint(server_round: int) -> Checkpoint:
    # Names out of alphabetical order: the order of sums must survive too.
    weights = {"z": np.full((2, 3), server_round, np.float32), "a": np.array([0.1], np.float32)}
    figures = tuple({"server_round": number} for number in range(1, server_round + 1))
    return Checkpoint(
        server_round=server_round, weights=weights, strategy_state={"m_t/z": weights["z"] / 3}, figures=figures
    )


@pytest.fixture
def run_dir(tmp_path):
    for server_round in range(4):
        save_checkpoint(tmp_path, a_checkpoint(server_round), plan_digest="plan", num_rounds=9)
    return tmp_path


def newest(run_dir):
    return run_dir / "checkpoints" / "round-00003.safetensors"


def test_what_is_loaded_is_what_was_saved(run_dir):
    loaded, saved = load_checkpoint(run_dir, plan_digest="plan"), a_checkpoint(3)
    assert (loaded.server_round, loaded.figures) == (saved.server_round, saved.figures)
    assert list(loaded.weights) == ["z", "a"]
    for found, expected in ((loaded.weights, saved.weights), (loaded.strategy_state, saved.strategy_state)):
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(run_dir, damage, caplog):
    content = newest(run_dir).read_bytes()
    if damage == "cut":
        newest(run_dir).write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        newest(run_dir).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        newest(run_dir).unlink()
    loaded = load_checkpoint(run_dir, plan_digest="plan")
    assert loaded.server_round == 2
    assert [entry["server_round"] for entry in loaded.figures] == [1, 2]
    assert "round-00003.safetensors is torn" in caplog.text


def test_going_on_after_a_fall_back_forgets_the_torn_round(run_dir):
    newest(run_dir).write_bytes(b"")
    again = load_checkpoint(run_dir, plan_digest="plan")
    save_checkpoint(run_dir, a_checkpoint(again.server_round + 1), plan_digest="plan", num_rounds=9)
    assert load_checkpoint(run_dir, plan_digest="plan").server_round == 3


def test_when_all_are_torn_it_says_so(run_dir):
    for path in run_dir.glob("checkpoints/round-*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="3 recorded, all torn"):
        load_checkpoint(run_dir, plan_digest="plan")


def test_another_plan_is_refused_for_reading_and_for_writing(run_dir):
    with pytest.raises(InputError, match="belongs to another plan"):
        load_checkpoint(run_dir, plan_digest="other")
    with pytest.raises(InputError, match="belongs to another plan"):
        save_checkpoint(run_dir, a_checkpoint(1), plan_digest="other", num_rounds=9)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"server_round": 3}'])
def test_a_state_that_no_run_wrote_is_refused(run_dir, content):
    (run_dir / "checkpoints" / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json is not a state that a run wrote"):
        load_checkpoint(run_dir, plan_digest="plan")


def test_a_full_disk_leaves_the_last_checkpoint(run_dir, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.files.os.fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*resume"):
        save_checkpoint(run_dir, a_checkpoint(4), plan_digest="plan", num_rounds=9)
    monkeypatch.undo()
    assert load_checkpoint(run_dir, plan_digest="plan").server_round == 3
    assert not list(run_dir.glob("checkpoints/*.partial"))


def test_old_checkpoints_do_not_pile_up(run_dir):
    kept = sorted(path.name for path in run_dir.glob("checkpoints/round-*"))
    assert kept == [f"round-0000{number}.safetensors" for number in (1, 2, 3)]
    assert json.loads((run_dir / "checkpoints" / "state.json").read_text())["server_round"] == 3
