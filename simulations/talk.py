"""Say on stderr what is going on: a bar on a terminal, sparse lines elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Talk:
    """Progress of one command; use as a context manager. ``quiet`` keeps everything but warnings back."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
            transient=True,
        )
        self._task: TaskID | None = None
        self._label = ""
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        if not self._quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def start(self, label: str, total: int) -> None:
        """Begin a stretch of ``total`` steps; :meth:`advance` moves it."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._label, self._next_line = self._bar.add_task(label, total=total), label, 0.25
        if self._bar.disable:
            self.say(f"{label} ...")

    def advance(self, done: int, total: int, figures: dict[str, Any] | None = None) -> None:
        """``done`` of ``total`` steps are over; elsewhere than on a terminal a line appears each quarter."""
        if self._task is not None:
            self._bar.update(self._task, completed=done)
        if self._bar.disable and done / total >= self._next_line and done < total:
            self._next_line += 0.25
            self.say(f"  {self._label}: {done}/{total}")
