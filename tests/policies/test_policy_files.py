"""Policies as JSON: the round trip, and files that are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy

per_step = st.tuples(st.floats(0, 20), st.floats(0, 20), st.floats(0, 20))
scalar_policies = st.one_of(
    st.builds(
        Policy,
        guidance_scale=st.one_of(st.none(), st.floats(0, 20), per_step),
        monitor=st.booleans(),
    ),
    st.builds(
        Policy,
        transition=st.just("dynamic"),
        before=st.one_of(st.sampled_from(["zero", "conditional", "opposite"]), st.floats(-9, 9)),
        deadline=st.one_of(st.none(), st.floats(0, 999)),
        gate=st.floats(1e-6, 9),
        gate_steps=st.integers(1, 9),
        min_step=st.integers(0, 9),
        min_drop=st.floats(0, 0.99),
        name=st.text(min_size=1, max_size=200),
    ),
)


@given(st.one_of(scalar_policies, st.lists(scalar_policies, min_size=1, max_size=4).map(Policy.stack)))
def test_json_round_trip(made):
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert Policy.from_dict(json.loads(text)) == made


def test_save_and_load(tmp_path):
    path = tmp_path / "guard.json"
    made = policy("og+dtp", gate=0.25, guidance_scale=[(7.5, 3.0), 2.0])
    made.save(path, provenance={"fpr": 0.01})
    assert Policy.load(path) == policy(str(path)) == policy(path) == made
    assert json.loads(path.read_text())["guidance_scale"] == [{"per_step": [7.5, 3.0]}, 2.0]
    assert policy(path, guidance_scale=None).guidance_scale is None
    assert [p.name for p in tmp_path.iterdir()] == ["guard.json"], "the temporary file is gone"


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        policy("dtp").save(tmp_path / "guard.txt")
    path = policy("dtp").save(tmp_path / "guard.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        policy("stp").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["guard.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fastguard_policy": 1, "gaet": 1}', "unknown policy field 'gaet'"),
        ('{"fastguard_policy": 2}', '"fastguard_policy": 1'),
        ('{"fastguard_policy": true}', '"fastguard_policy": 1'),
        ('{"transition": "dynamic"}', '"fastguard_policy": 1'),
        ("[1]", '"fastguard_policy": 1'),
        (
            '{"fastguard_policy": 1, "transition": "dynamic", "gate": NaN}',
            "NaN is not a number of JSON",
        ),
        ('{"fastguard_policy": 1, "transition": "dynamic", "gate": 1e999}', "gate=inf"),
        ('{"fastguard_policy": 1, "name": "a", "name": "b"}', "'name' occurs twice"),
        ('{"fastguard_policy": 1, "guidance_scale": {"steps": [1]}}', "per_step"),
        ('{"fastguard_policy": 1, "guidance_scale": {"per_step": []}}', "guidance_scale=()"),
        ('{"fastguard_policy": 1, "guidance_scale": 1e300}', "guidance_scale=1e+300: must be from 0 to 1000"),
        ('{"fastguard_policy": 1, "before": ' + "[" * 900 + "]" * 900 + "}", "before"),
        ('{"fastguard_policy": 1, "provenance": [1]}', "provenance=[1]: must be an object"),
        ("[" * 10**5, "not valid JSON"),
        ('{"fastguard_policy": 1', "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        Policy.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        policy("nowhere.json")
