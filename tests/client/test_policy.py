"""The owner's policy file: every key explained, nothing useless or unknown passes, what is written reads back."""

import math
from datetime import date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from client.policy import Policy
from shared.errors import InputError

LEAST = """
data_source = "shop-2026"
catalogue_hash = "abc"
max_users = 40
[ceilings]
epsilon = 8
delta = 1e-3
"""


def values(**changes: Any) -> dict[str, Any]:
    """A real owner's least policy; ``section__key`` sets a key of a section."""
    made: dict[str, Any] = {
        "data_source": "shop-2026",
        "catalogue_hash": "abc",
        "max_users": 40,
        "ceilings": {"epsilon": 8.0, "delta": 1e-3},
    }
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = made
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return made


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    keys: dict[str, str | None] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= keys_of(inner, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.description
    return keys


def test_the_least_policy_is_a_careful_one(tmp_path):
    (tmp_path / "policy.toml").write_text(LEAST)
    policy = Policy.load(tmp_path)
    assert policy == Policy.model_validate(values())
    assert (policy.simulated, policy.approval.auto_approve, policy.expires) == (False, False, None)
    assert (policy.limits.min_noise_multiplier, policy.limits.min_owners) == (0.3, 2)
    assert set(policy.allowed.generators) == {"vae", "gan", "sequence", "spectral"}
    assert policy.allowed.releases == ("dp_sgd_poisson", "gaussian")


def test_every_key_is_described_in_the_file_it_is_written_to(tmp_path):
    Policy.model_validate(values()).save(tmp_path)
    text = (tmp_path / "policy.toml").read_text()
    described = keys_of(Policy)
    assert len(described) > 20
    for key, description in described.items():
        assert description, key
        assert f"# {description}\n" in text, key


name_of_data = st.from_regex(r"[A-Za-z0-9._-]{1,100}", fullmatch=True)
positive = st.floats(min_value=1e-300, max_value=1e300)
count = st.integers(1, 2**53)
hashes = st.lists(st.from_regex(r"[0-9a-f]{64}", fullmatch=True), max_size=2)
one_line = st.text(min_size=1).filter(str.isprintable)

policies = st.builds(
    values,
    data_source=name_of_data,
    max_users=count,
    max_items_per_user=count,
    expires=st.none() | st.dates(),
    opt_out=st.none() | one_line,
    simulated=st.just(True),  # any epsilon and delta
    ceilings__epsilon=st.none() | positive,
    ceilings__epsilon_per_run=st.none() | positive,
    ceilings__delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    limits__min_noise_multiplier=positive,
    limits__max_sample_rate=st.floats(0, 1, exclude_min=True),
    limits__max_steps_per_run=st.integers(1, 10**6),
    allowed__generators=st.sampled_from([(), ("vae",)]),
    allowed__code=hashes,
    approval__auto_approve=st.just(True),
    approval__auto_epsilon_per_run=positive,
    approval__auto_epsilon_total=positive,
    dpsgd__device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
)


@given(given=policies)
def test_what_is_saved_loads_back_equal(given, tmp_path_factory):
    directory = tmp_path_factory.mktemp("owner")
    policy = Policy.model_validate(given)
    policy.save(directory)
    again = Policy.load(directory)
    assert again == policy
    assert again.digest == policy.digest


def test_the_digest_tells_every_key_apart_and_not_how_a_number_was_written():
    changes: list[dict[str, Any]] = [
        {},
        {"data_source": "other"},
        {"max_users": 41},
        {"expires": date(2027, 1, 1)},
        {"opt_out": "out.txt"},
        {"simulated": True},
        {"ceilings__epsilon": 7.0},
        {"ceilings__delta": 1e-4},
        {"limits__min_owners": 3},
        {"allowed__code": ["a" * 64]},
        {"dpsgd__engine": "hooks"},
    ]
    digests = [Policy.model_validate(values(**change)).digest for change in changes]
    assert len(set(digests)) == len(digests)
    assert Policy.model_validate(values(ceilings__epsilon=8)).digest == digests[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_source": "my shop"}, "data_source: String should match"),
        ({"data_source": ""}, "data_source: String should match"),
        ({"catalogue_hash": ""}, "catalogue_hash: String should match"),
        ({"max_users": 0}, "max_users: Input should be greater than or equal to 1"),
        ({"max_users": True}, "max_users: Input should be a valid integer"),
        ({"max_users": 2**60}, "max_users: Input should be less"),
        ({"max_users": 40.0}, "max_users: Input should be a valid integer"),
        ({"expires": "tomorrow"}, "expires: Input should be a valid date"),
        ({"expires": datetime(2027, 1, 1)}, "expires: Input should be a valid date"),
        ({"opt_out": "two\nlines"}, "opt_out: Value error, must be text of one line"),
        ({"simulated": "yes"}, "simulated: Input should be a valid boolean"),
        ({"ceilings__epsilon": math.inf}, "ceilings.epsilon: Input should be a finite number"),
        ({"ceilings__epsilon": math.nan}, "ceilings.epsilon: Input should be a finite number"),
        ({"ceilings__epsilon": 0}, "ceilings.epsilon: Input should be greater than 0"),
        ({"ceilings__epsilon": True}, "ceilings.epsilon: Input should be a valid number"),
        ({"ceilings__epsilon": "8"}, "ceilings.epsilon: Input should be a valid number"),
        ({"ceilings__delta": 0.0}, "ceilings.delta: Input should be greater than 0"),
        ({"ceilings__delta": 1.0}, "ceilings.delta: Input should be less than 1"),
        ({"limits__max_sample_rate": 1.5}, "limits.max_sample_rate: Input should be less than or equal to 1"),
        ({"limits__max_steps_per_run": 10**7}, "limits.max_steps_per_run: Input should be less"),
        ({"limits__min_noise_multiplier": math.inf}, "limits.min_noise_multiplier: Input should be a finite number"),
        ({"limits__min_noise": 1.0}, "limits.min_noise: Extra inputs are not permitted"),
        ({"allowed__generators": ["gam"]}, "allowed.generators.0: Input should be 'vae'"),
        ({"allowed__code": ["latest"]}, "allowed.code.0: String should match"),
        ({"dpsgd__engine": "fast"}, "dpsgd.engine: Input should be 'bookkeeping'"),
        ({"dpsgd__device": "gpu"}, "dpsgd.device: String should match"),
        ({"privacy": {}}, "privacy: Extra inputs are not permitted"),
    ],
)
def test_a_useless_value_is_refused_with_its_key(change, words):
    with pytest.raises(ValidationError) as error:
        Policy.model_validate(values(**change))
    said = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.value.errors()]
    assert any(line.startswith(words) for line in said), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"4 problem\(s\)[^$]*data_source: missing[^$]*ceilings: missing"),
        (LEAST.replace("8", "-8"), r"1 problem\(s\)[^$]*ceilings\.epsilon: .*greater than 0 \(got -8\)"),
        (LEAST.replace("epsilon", "epsilom"), r"1 problem\(s\)[^$]*ceilings\.epsilom: Extra inputs"),
        (LEAST.replace("epsilon = 8", ""), r"1 problem\(s\)[^$]*ceilings\.epsilon: missing, and only a simulation"),
        (LEAST.replace("1e-3", "0.03"), r"ceilings\.delta: 0\.03 is above 1 / max_users = 0\.025"),
        (LEAST + "[approval]\nauto_approve = true\n", r"2 problem\(s\)[^$]*auto_epsilon_total: missing, and auto_ap"),
        (LEAST + "epsilon = 9\n", "Cannot overwrite a value"),
        ("data_source", "Expected '='"),
    ],
)
def test_an_unusable_file_names_each_problem_and_its_consequence(text, words, tmp_path):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(InputError, match=f"(?s)no usable policy at .*policy.toml.*{words}") as error:
        Policy.load(tmp_path)
    assert "nothing is trained without one" in str(error.value)


def test_no_file_and_no_text_are_no_policy(tmp_path):
    with pytest.raises(InputError, match=r"No such file.*nothing is trained without one"):
        Policy.load(tmp_path)
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"can't decode.*nothing is trained without one"):
        Policy.load(tmp_path)


def test_a_simulation_may_go_without_a_ceiling():
    policy = Policy.model_validate(values(simulated=True, ceilings__epsilon=None, ceilings__delta=0.5))
    assert policy.ceilings.epsilon is None


def test_a_real_owner_may_not_choose_the_engine_that_draws_anew():
    ghost = {"dpsgd": {"engine": "ghost"}}
    with pytest.raises(ValueError, match="only a simulation may use it"):
        Policy.model_validate(values(**ghost))
    assert Policy.model_validate(values(**ghost, simulated=True)).dpsgd.engine == "ghost"
