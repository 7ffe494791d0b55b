"""Scenarios: every key has a default, nothing unknown passes, every problem is named."""

import json
import math
from pathlib import Path

import pytest
from pydantic import BaseModel

from shared.config import Scenario, load_scenario
from shared.errors import InputError


def test_every_key_has_a_default_and_survives_json():
    scenario = load_scenario(None, [])
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        keys += keys_of(inner, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def test_every_key_stands_in_the_documents_with_its_default():
    document = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for key in keys_of(Scenario):
        value: object = Scenario()
        for part in key.split("."):
            value = getattr(value, part)
        row = next(line for line in document.splitlines() if line.startswith(f"| `{key}` |"))
        shown = row.split("|")[3].strip().strip("`")
        expected = {"": "empty", "None": "none", "True": "true", "False": "false"}.get(str(value), str(value))
        if isinstance(value, tuple):
            expected = json.dumps(list(value))
        assert shown == expected, key


def test_a_file_is_read_and_flags_win(tmp_path):
    path = tmp_path / "books.toml"
    path.write_text('[data]\npath = "a.csv"\n[privacy]\nepsilon = 3\n')
    scenario = load_scenario(path, ["privacy.epsilon=inf", "data.num_owners=20", "data.path=b c.csv"], seed=4)
    assert (scenario.privacy.epsilon, scenario.data.num_owners, scenario.data.path) == (math.inf, 20, "b c.csv")
    assert scenario.seed == 4


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("privacy.epsilon=0", "greater than 0"),
        ("privacy.epsilon=-1", "greater than 0"),
        ("privacy.epsilon=nan", "greater than 0"),
        ("privacy.delta=1", "less than 1"),
        ("privacy.nosie=1", "Extra inputs are not permitted"),
        ("federation.min_owners=1", "greater than or equal to 2"),
        ("augmentation.weights=[0.1, 0.3]", "must contain 0"),
        ("augmentation.weights=[0, inf]", "finite number"),
        ("privacy.sample_rate=1.5", "less than or equal to 1"),
        ("data", "expected KEY=VALUE"),
        ("data.path.deeper=1", "valid string|not a section"),
    ],
)
def test_bad_values_are_named_with_what_is_wrong(override, advice):
    with pytest.raises(InputError, match=advice):
        load_scenario(None, [override])


def test_all_problems_are_named_at_once(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text("[privacy]\nepsilon = -1\nnosie = 2\n")
    with pytest.raises(InputError, match=r"2 problem\(s\)\n  privacy\.epsilon.*\n  privacy\.nosie"):
        load_scenario(path, [])


def test_a_missing_or_broken_file_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="Give the path of a TOML file"):
        load_scenario(tmp_path / "none.toml", [])
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(InputError, match="not readable as TOML"):
        load_scenario(tmp_path / "broken.toml", [])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "docs" / "scenarios").glob("*.toml")), ids=str)
def test_scenarios_that_come_with_the_documents_are_valid(path):
    assert load_scenario(path, []) != load_scenario(None, [])
