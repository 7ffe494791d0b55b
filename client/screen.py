"""Write an owner's results to stdout, talk to stderr."""

import json
import sys
from typing import Any

from rich.console import Console

from shared.files import finite

_WIDTH_OF_FILES = 150  # where no terminal says how wide it is


def results() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, style="yellow", markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(finite(value), allow_nan=False))
