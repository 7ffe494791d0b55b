"""One data set, one agent at a time."""

import multiprocessing
import os
import signal
import time

import pytest

from client.store.lock import agent_lock
from shared.errors import InputError, RefusedError


def hold(directory, here):
    with agent_lock(directory, timeout_seconds=5):
        here.send("held")
        here.poll(30)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until something is sent to it."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.poll(30)
    yield process, here
    process.kill()
    process.join(30)


def test_a_second_agent_is_told_who_holds_the_folder(tmp_path, holder):
    process, _ = holder
    started = time.monotonic()
    with (
        pytest.raises(RefusedError, match=rf'"pid": {process.pid}\b.*One data set has one agent: wait'),
        agent_lock(tmp_path, timeout_seconds=0.3),
    ):
        pytest.fail("two agents at once")
    assert 0.3 <= time.monotonic() - started < 5


def test_a_second_agent_waits_for_its_turn(tmp_path, holder):
    process, there = holder
    there.send("let go")
    with agent_lock(tmp_path, timeout_seconds=30):
        process.join(30)
        assert str(os.getpid()) in (tmp_path / "agent.lock").read_text()


def test_an_agent_that_was_killed_holds_nothing(tmp_path, holder):
    process, _ = holder
    os.kill(process.pid, signal.SIGKILL)
    with agent_lock(tmp_path, timeout_seconds=5):
        pass


def test_two_threads_of_one_agent_take_turns_too(tmp_path):
    with (
        agent_lock(tmp_path, timeout_seconds=0),
        pytest.raises(RefusedError, match=rf'"pid": {os.getpid()}\b'),
        agent_lock(tmp_path, timeout_seconds=0),
    ):
        pytest.fail("two requests at once")


def test_a_folder_without_room_for_a_lock_is_refused_with_advice(tmp_path):
    with (
        pytest.raises(InputError, match="a folder it may write to"),
        agent_lock(tmp_path / "missing", timeout_seconds=0),
    ):
        pytest.fail("locked nothing")
