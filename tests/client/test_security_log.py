"""The security log: whole lines, bounded, no data, and no release without it."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.security_log import SecurityLog, described
from shared.errors import InputError
from shared.generators.family import initial_weights
from tests.small_federation import SPEC

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path) -> SecurityLog:
    return SecurityLog(tmp_path)


def test_a_line_says_when_and_what(log, tmp_path):
    log.write("decision", run="a-test", server_round=3, rule="noise-floor", epsilon=math.inf, refused=True)
    log.write("release", run="a-test", server_round=4, **described(initial_weights(SPEC, 1)))
    first, second = log.lines()
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "event": "decision",
        "run": "a-test",
        "server_round": 3,
        "rule": "noise-floor",
        "epsilon": "inf",
        "refused": True,
    }
    assert second["shapes"]["encoder.weight"] == [12, 6]
    assert set(second["dtypes"].values()) == {"float32"}
    assert len((tmp_path / "security.jsonl").read_text().splitlines()) == 2


def test_norms_are_those_of_the_arrays():
    arrays = {"a": np.float32([[3, 0], [0, 4]]), "b": np.full(10, 1e30, dtype=np.float32), "c": np.float32(2)}
    told = described(arrays)
    assert told["l2_norms"] == pytest.approx({"a": 5.0, "b": 1e30 * math.sqrt(10), "c": 2.0}, rel=1e-6)
    assert told["num_bytes"] == 4 * (4 + 10 + 1)


scalars = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, min_value=-1e308) | st.text(max_size=200)
lists = st.lists(scalars, max_size=16)
fields = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name not in {"time", "event", "self"}),
    scalars | lists | st.dictionaries(st.text(max_size=20), scalars | lists, max_size=5),
    max_size=5,
)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for inner in pair for text in texts_in(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [value] if isinstance(value, str) else []


@given(fields=fields)
def test_whatever_is_allowed_makes_one_printable_line_that_reads_back(fields, tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    log = SecurityLog(directory)
    log.write("message", **fields)
    text = (directory / "security.jsonl").read_text(encoding="ascii")
    assert text.count("\n") == 1
    assert text[:-1].isprintable()
    (line,) = log.lines()
    # JSON's own escapes end when it is read; what a terminal would obey has to stay escaped then.
    assert all(text.isprintable() for text in texts_in(line))
    assert {"time", "event"} < set(line) or not fields


def test_control_characters_stay_escaped_for_whoever_reads_the_value(log):
    log.write("message", run="\x1b[2J\r\n\u202etxt.exe\x7f é")
    (line,) = log.lines()
    assert line["run"] == r"\x1b[2J\r\n\u202etxt.exe\x7f é"


class Odd:
    def __str__(self) -> str:
        return "user 4711"


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"bytes",
        Odd(),
        {1, 2},
        np.zeros(3),
        np.float32(1),
        math.nan,
        -math.inf,
        2**63,
        10**5000,
        "x" * 201,
        list(range(17)),
        {str(number): 1 for number in range(1001)},
        {4711: 1},
        {"x" * 201: 1},
        [[[[1]]]],
        {"a": Odd()},
        [None],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_data_is_refused_and_not_quoted(value, log, tmp_path):
    with pytest.raises(ValueError, match="log") as told:
        log.write("error", detail=value)
    assert "4711" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_field_cannot_replace_the_time_and_a_line_has_an_end(log):
    with pytest.raises(ValueError, match="'time'"):
        log.write("error", time="yesterday")
    with pytest.raises(ValueError, match=r"a line of .* bytes"):
        log.write("error", detail={str(number): "x" * 190 for number in range(999)})


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path):
    log = SecurityLog(tmp_path, max_bytes=1000, num_files=3)
    for number in range(200):
        log.write("message", number=number)
    files = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert files == ["security.1.jsonl", "security.2.jsonl", "security.jsonl"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.glob("*.jsonl"))
    numbers = [line["number"] for line in log.lines()]
    assert numbers == list(range(numbers[0], 200))
    assert len(numbers) > 20


def test_one_file_is_a_bound_too(tmp_path):
    log = SecurityLog(tmp_path, max_bytes=500, num_files=1)
    for number in range(50):
        log.write("message", number=number)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["security.jsonl"]
    assert (tmp_path / "security.jsonl").stat().st_size <= 500
    assert list(log.lines())[-1]["number"] == 49


def test_a_line_torn_by_a_power_cut_spoils_no_other(log, tmp_path):
    log.write("message", number=1)
    with (tmp_path / "security.jsonl").open("a") as file:
        file.write('{"time": "2026')
    log.write("message", number=2)
    assert [line["number"] for line in log.lines()] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from client.security_log import SecurityLog
log = SecurityLog(Path(sys.argv[1]), max_bytes=20_000, num_files=40)
for number in range(300):
    log.write("message", writer=int(sys.argv[2]), number=number, padding="x" * 150)
"""


def test_two_processes_lose_and_mix_no_line(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)], cwd=ROOT) for n in (0, 1)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    lines = list(SecurityLog(tmp_path, num_files=40).lines())
    for writer in (0, 1):
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(300))


def blocked_by_a_folder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "security.jsonl").mkdir()


def disk_full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.security_log.os.write", full)


def disk_nearly_full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from os import write

    monkeypatch.setattr("client.security_log.os.write", lambda file, line: write(file, line[:10]))


def no_lock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "security.lock").mkdir()


@pytest.mark.parametrize("trouble", [blocked_by_a_folder, disk_full, disk_nearly_full, no_lock])
def test_a_line_that_cannot_be_written_stops_the_release(trouble, log, tmp_path, monkeypatch):
    trouble(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="nothing is released without its log"):
        log.write("release", run="a-test")
    monkeypatch.undo()
    if (tmp_path / "security.jsonl").is_file():
        assert list(log.lines()) == []
        log.write("release", run="a-test")
        assert len(list(log.lines())) == 1


def test_the_log_is_its_owners_to_read(log, tmp_path):
    log.write("message", number=1)
    assert (tmp_path / "security.jsonl").stat().st_mode & 0o077 == 0
