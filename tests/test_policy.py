"""Policies: validation, presets, files, and their lowering to tables."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.kernels.layout import NEVER, Magnitude, Phase, Rule, RuleKind, State
from fastguard.plan import gate_threshold
from fastguard.policy import DEADLINE, PRESETS, Policy, lower, policy

NAN, INF = math.nan, math.inf
TIMES = list(range(981, 0, -20))  # the 50 timesteps of DDIM on the default grid


def plan(*policies, timesteps=TIMES, observe=None, guidance_scale=7.5, elements=4096):
    observe = [True] * len(timesteps) if observe is None else observe
    return lower(
        list(policies),
        timesteps=timesteps,
        observe=observe,
        guidance_scale=guidance_scale,
        elements=elements,
    )


# Validation ----------------------------------------------------------------------------------------------------------------

DYNAMIC = {"transition": "dynamic"}
STATIC = {"transition": "static", "t_star": 500}
WRONG = [
    ({"before": "none", **DYNAMIC}, "before='none'", "'zero', 'conditional', 'opposite'"),
    ({"before": True, **DYNAMIC}, "before=True", "'zero'"),
    ({"before": NAN, **DYNAMIC}, "before=nan", "finite"),
    ({"before": None, **DYNAMIC}, "before=None", "'zero'"),
    ({"before": "opposite"}, "before='opposite'", "transition"),
    ({"transition": "Static"}, "transition='Static'", "None, 'static', 'dynamic'"),
    ({"transition": 1}, "transition=1", "'static'"),
    ({"transition": "static"}, "t_star=None", "transition='static'"),
    ({"transition": "static", "t_star": -1}, "t_star=-1", ">= 0"),
    ({"transition": "static", "t_star": True}, "t_star=True", ">= 0"),
    ({"transition": "static", "t_star": "500"}, "t_star='500'", ">= 0"),
    ({"t_star": 500}, "t_star=500.0", "transition='static'"),
    ({"t_star": 500, **DYNAMIC}, "t_star=500.0", "transition='static'"),
    ({"deadline": NAN, **DYNAMIC}, "deadline=nan", ">= 0"),
    ({"deadline": -0.5, **DYNAMIC}, "deadline=-0.5", ">= 0"),
    ({"deadline": 300, **STATIC}, "deadline=300.0", "transition='dynamic'"),
    ({"rule": "max", **DYNAMIC}, "rule='max'", "'minimum', 'drop'"),
    ({"rule": "drop", **STATIC}, "rule='drop'", "transition='dynamic'"),
    ({"rule": "drop", "rho": 0, **DYNAMIC}, "rho=0", "between 0 and 1"),
    ({"rule": "drop", "rho": 1.0, **DYNAMIC}, "rho=1.0", "between 0 and 1"),
    ({"rho": 0.5, **DYNAMIC}, "rho=0.5", "rule='drop'"),
    ({"magnitude": "eps", **DYNAMIC}, "magnitude='eps'", "'output', 'epsilon', 'x0'"),
    ({"magnitude": "x0", **STATIC}, "magnitude='x0'", "transition='dynamic'"),
    ({"gate": 0, **DYNAMIC}, "gate=0", "above 0"),
    ({"gate": -1.0, **DYNAMIC}, "gate=-1.0", "above 0"),
    ({"gate": INF, **DYNAMIC}, "gate=inf", "finite"),
    ({"gate": NAN, **DYNAMIC}, "gate=nan", "finite"),
    ({"gate": True, **DYNAMIC}, "gate=True", "above 0"),
    ({"gate": 0.1}, "gate=0.1", "transition"),
    ({"gate": 0.1, "gate_steps": 0, **DYNAMIC}, "gate_steps=0", "at least 1"),
    ({"gate": 0.1, "gate_steps": 2.0, **DYNAMIC}, "gate_steps=2.0", "integer"),
    ({"gate": 0.1, "gate_steps": True, **DYNAMIC}, "gate_steps=True", "integer"),
    ({"gate_steps": 2, **DYNAMIC}, "gate_steps=2", "a gate"),
    ({"min_step": -1, **DYNAMIC}, "min_step=-1", "at least 0"),
    ({"min_step": 2, **STATIC}, "min_step=2", "transition='dynamic'"),
    ({"min_drop": 1.0, **DYNAMIC}, "min_drop=1.0", "from 0 to below 1"),
    ({"min_drop": -0.1, **DYNAMIC}, "min_drop=-0.1", "from 0 to below 1"),
    ({"min_drop": 0.1, "rule": "drop", **DYNAMIC}, "min_drop=0.1", "rule='minimum'"),
    ({"opposite_steps": 3, **DYNAMIC}, "opposite_steps=3", "before='opposite'"),
    ({"before": "opposite", "opposite_steps": -1, **DYNAMIC}, "opposite_steps=-1", "at least 0"),
    ({"monitor": 1}, "monitor=1", "True or False"),
    ({"guidance_scale": "7.5"}, "guidance_scale='7.5'", "one per denoiser row"),
    ({"guidance_scale": INF}, "guidance_scale=inf", "finite"),
    ({"guidance_scale": False}, "guidance_scale=False", "finite"),
    ({"guidance_scale": ()}, "guidance_scale=()", "tuple"),
    ({"guidance_scale": (7.5, NAN)}, "guidance_scale[1]=nan", "finite"),
    ({"name": ""}, "name=''", "not empty"),
    ({"name": "x" * 201}, "name='xxx", "at most 200 characters"),
    ({"name": "\ud800"}, "name='\\ud800'", "UTF-8"),
    ({"gate": 0.1, "gate_steps": 10**30, **DYNAMIC}, "gate_steps=1000", "must be from 1 to 10000"),
    ({"min_step": 10**30, **DYNAMIC}, "min_step=1000", "must be from 0 to 10000"),
    ({"min_step": 10**5000, **DYNAMIC}, "min_step=<int too large to show>", "must be from 0 to 10000"),
    ({"before": "opposite", "opposite_steps": 10_001, **DYNAMIC}, "opposite_steps=10001", "must be from 0 to 10000"),
    ({"min_step": [0, 10**30], **DYNAMIC}, "sample 1: min_step=1000", "must be from 0 to 10000"),
    ({"before": -1e300, **DYNAMIC}, "before=-1e+300", "must be from -1000 to 1000"),
    ({"guidance_scale": 1e300}, "guidance_scale=1e+300", "must be from 0 to 1000"),
    ({"guidance_scale": -0.1}, "guidance_scale=-0.1", "must be from 0 to 1000"),
    ({"guidance_scale": (7.5, 1001)}, "guidance_scale=1001.0", "must be from 0 to 1000"),
    ({"before": "x" * 10**6, **DYNAMIC}, "before='xxx", "a finite number"),
    ({"rule": (0,) * 10**6, **DYNAMIC}, "rule=(0, 0, ", "allowed are 'minimum', 'drop'"),
    (
        {"gate": [0.1, 0.2], "deadline": [300], **DYNAMIC},
        "deadline has 1, gate has 2",
        "equally long",
    ),
    ({"gate": [], **DYNAMIC}, "gate has 0", "not empty"),
    ({"gate": [0.1, -0.2], **DYNAMIC}, "sample 1: gate=-0.2", "above 0"),
    ({"transition": ["dynamic", "static"]}, "sample 1: t_star=None", "transition='static'"),
]


@pytest.mark.parametrize(("fields", "named", "allowed"), WRONG, ids=[named for _, named, _ in WRONG])
def test_wrong_value_is_named(fields, named, allowed):
    with pytest.raises(ValueError) as error:
        Policy(**fields)
    assert named in str(error.value)
    assert allowed in str(error.value)
    assert len(str(error.value)) < 500


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown policy field 'xxx.*\.\.\.: allowed") as error:
        Policy.from_dict({"fastguard_policy": 1, "x" * 10**6: 1})
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match=r"unknown policy field 'gaet'.*gate"):
        policy("dtp", gaet=0.1)
    with pytest.raises(ValueError, match=r"policy='dpt'.*dtp.*\.json"):
        policy("dpt")
    with pytest.raises(ValueError, match="policy=7"):
        policy(7)
    with pytest.raises(TypeError):
        Policy("zero")


def test_numbers_become_plain_floats():
    made = Policy(
        transition="static",
        t_star=np.float32(500),
        before=np.int64(-2),
        guidance_scale=(1, np.float64(2)),
    )
    assert made == Policy(transition="static", t_star=500.0, before=-2.0, guidance_scale=(1.0, 2.0))
    assert type(made.t_star) is type(made.before) is float


# Presets -------------------------------------------------------------------------------------------------------------------


def test_presets():
    """Section "Presets" of the algorithm page, spelled out."""
    expected = {
        "cfg": ("zero", None, None, None),
        "stp": ("zero", "static", 500.0, None),
        "og+stp": (-2.0, "static", 650.0, None),
        "dtp": ("zero", "dynamic", None, DEADLINE),
        "og+dtp": ("opposite", "dynamic", None, DEADLINE),
        "paper-dtp": ("zero", "dynamic", None, None),
        "paper-og+dtp": ("opposite", "dynamic", None, None),
        "released-dtp": ("conditional", "dynamic", None, None),
    }
    found = {p.name: (p.before, p.transition, p.t_star, p.deadline) for p in PRESETS.values()}
    assert found == expected


def test_ungated_warning():
    assert policy("cfg").ungated_warning() is None
    assert not policy("cfg").guarded
    assert policy("dtp").guarded
    assert "'dtp'" in policy("dtp").ungated_warning()
    assert policy("dtp", gate=0.1).ungated_warning() is None
    mixed = Policy.stack([policy("cfg"), policy("dtp", gate=0.1)])
    assert mixed.guarded
    assert mixed.ungated_warning() is None
    assert Policy.stack([policy("dtp", gate=0.1), policy("stp")]).ungated_warning()


# Per-image values ----------------------------------------------------------------------------------------------------------


def test_samples_and_stack():
    four = [
        policy("cfg"),
        policy("dtp", gate=0.1, gate_steps=3),
        policy("og+stp"),
        policy("og+dtp", opposite_steps=5),
    ]
    stacked = Policy.stack(four)
    assert stacked.samples(4) == four
    assert stacked.name == ["cfg", "dtp", "og+stp", "og+dtp"]
    with pytest.raises(ValueError, match="lists of 4 values, but the batch has 3"):
        stacked.samples(3)
    assert policy("dtp").samples(3) == [policy("dtp")] * 3
    assert Policy(guidance_scale=[(1, 2), 3]).samples(2) == [
        Policy(guidance_scale=(1, 2)),
        Policy(guidance_scale=3),
    ]
    with pytest.raises(ValueError, match="at least one"):
        Policy.stack([])
    with pytest.raises(ValueError, match=r"policies\[1\] already holds"):
        Policy.stack([policy("cfg"), stacked])


def test_lists_are_copied():
    gates = [0.1, 0.2]
    made = policy("dtp", gate=gates)
    gates.append(-1)
    assert made.gate == [0.1, 0.2]


# Files ---------------------------------------------------------------------------------------------------------------------

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


# Lowering ------------------------------------------------------------------------------------------------------------------


def test_static_needs_one_branch_before_t_star():
    """stp at t* = 500: 25 of 50 rows with the unconditional branch alone, 0.75 of plain guidance's denoiser rows."""
    branches = plan(policy("stp"), policy("stp", guidance_scale=3)).branches
    assert branches == ("uncond",) * 25 + ("both",) * 25
    assert plan(policy("stp", before="conditional")).branches == ("cond",) * 25 + ("both",) * 25
    assert plan(policy("stp"), policy("stp", before="conditional")).branches == ("both",) * 50
    assert plan(policy("stp"), policy("stp", t_star=700)).branches == ("uncond",) * 15 + ("both",) * 35
    for other in (policy("cfg"), policy("dtp"), policy("og+stp")):
        assert plan(policy("stp"), other).branches == ("both",) * 50
    for fields in ({"monitor": True}, {"gate": 0.1}):
        assert plan(policy("stp", **fields)).branches == ("both",) * 50


def test_interval_needs_one_branch_outside():
    interval = (1.0,) * 10 + (7.5,) * 20 + (0.0,) * 20
    assert plan(policy("cfg", guidance_scale=interval)).branches == ("cond",) * 10 + ("both",) * 20 + ("uncond",) * 20
    assert plan(policy("dtp", guidance_scale=interval)).branches == ("both",) * 50
    assert plan(policy("cfg", guidance_scale=interval, monitor=True)).branches == ("both",) * 50


def test_guidance():
    schedule = tuple(float(k) for k in range(50))
    table = plan(
        policy("cfg"),
        policy("dtp"),
        policy("released-dtp", guidance_scale=3.0),
        policy("og+dtp", guidance_scale=schedule, opposite_steps=4),
        policy("og+stp"),
        policy("og+stp", opposite_steps=2),
    ).guidance
    assert table.dtype == torch.float32
    assert table[0, :, 1].tolist() == table[1, :, 1].tolist() == [7.5] * 50
    assert table[1, :, 0].tolist() == [0.0] * 50
    assert table[2].tolist() == [[1.0, 3.0]] * 50
    assert table[3, :, 0].tolist() == [0.0, -1.0, -2.0, -3.0] + [0.0] * 46
    assert table[3, :, 1].tolist() == list(schedule)
    assert table[4].tolist() == [[-2.0, 7.5]] * 50
    assert table[5, :, 0].tolist() == [-2.0] * 2 + [0.0] * 48


def test_switch_rows():
    """The first OBSERVING row at or below t*: Heun's and PNDM's second evaluations of a noise level do not count."""
    times = [900, 700, 700, 500, 500, 300, 300]
    observe = [True, True, False, False, True, True, False]
    stop = [policy("stp", t_star=t) for t in (950, 900, 700, 500, 499, 300, 299)]
    rules = plan(*stop, timesteps=times, observe=observe).rules
    assert rules[:, Rule.SWITCH_ROW].tolist() == [0, 0, 1, 4, 5, 5, NEVER]
    assert rules[:, Rule.KIND].tolist() == [RuleKind.NONE] * 7
    rules = plan(
        policy("dtp", deadline=300), policy("paper-dtp"), policy("cfg"), timesteps=times, observe=observe
    ).rules
    assert rules[:, Rule.SWITCH_ROW].tolist() == [5, NEVER, NEVER]
    assert rules[:, Rule.KIND].tolist() == [RuleKind.MINIMUM, RuleKind.MINIMUM, RuleKind.NONE]


def test_rule_and_state_tables():
    made = Policy(
        transition="dynamic",
        rule="drop",
        rho=0.25,
        magnitude="x0",
        gate=0.5,
        gate_steps=3,
        min_step=4,
    )
    tables = plan(made, policy("dtp", min_drop=0.1, magnitude="epsilon"), policy("cfg"))
    rule, state = tables.rules, tables.state
    assert rule.dtype == state.dtype == torch.float64
    assert rule[0, Rule.KIND] == RuleKind.DROP
    assert rule[0, Rule.MAGNITUDE] == Magnitude.X0
    assert rule[0, Rule.RHO] == 0.25
    assert rule[0, Rule.GATE] == 0.25 * 4096
    assert rule[0, Rule.GATE_STEPS] == 3
    assert rule[0, Rule.MIN_STEP] == 4
    assert rule[1, Rule.FLOOR] == 0.9
    assert rule[1, Rule.MAGNITUDE] == Magnitude.EPSILON
    assert rule[1, Rule.GATE_STEPS] == 0
    assert state[:, State.PHASE].tolist() == [Phase.UNDECIDED, Phase.BEFORE, Phase.PLAIN]
    assert state[:, State.MAXIMUM].tolist() == state[:, State.GATE_D].tolist() == [-INF] * 3
    assert state[:, [State.LAST, State.BEFORE_LAST, State.MARGIN]].isnan().all()
    never = [
        State.TRANSITION_STEP,
        State.MINIMUM_STEP,
        State.GATE_STEP,
        State.NON_FINITE,
        State.LAST_ROW,
    ]
    assert (state[:, never] == -1).all()
    assert (state[:, [State.STEP, State.BASE, State.OBSERVATIONS, State.FORCED]] == 0).all()


@given(st.floats(1e-300, 1e25), st.integers(1, 4 * 256 * 256))
def test_gate_threshold_is_the_smallest(tau, elements):
    """Comparing d with the threshold decides as comparing sqrt(d / elements) with tau in float64 does, at the very last float32."""
    d = np.float32(gate_threshold(tau, elements))
    below = np.nextafter(d, np.float32(-np.inf))
    assert math.sqrt(float(d) / elements) >= tau
    assert below < 0 or math.sqrt(float(below) / elements) < tau


def test_thresholds_grow_with_tau():
    thresholds = [gate_threshold(tau, 16384) for tau in np.linspace(0.01, 2, 500)]
    assert all(a < b for a, b in pairwise(thresholds))


def test_lower_refuses():
    with pytest.raises(ValueError, match="has 3 values: must be one per denoiser row, 50"):
        plan(policy("cfg", guidance_scale=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"policies\[0\] holds per-image lists"):
        plan(policy("dtp", gate=[0.1, 0.2]))
    with pytest.raises(ValueError, match="observe has 3 values"):
        plan(policy("cfg"), observe=[True] * 3)
    with pytest.raises(ValueError, match="guidance_scale=nan"):
        plan(policy("cfg"), guidance_scale=NAN)
    with pytest.raises(ValueError, match="elements=0"):
        plan(policy("cfg"), elements=0)


def test_warning_names_each_ungated_policy_once():
    mixed = Policy.stack([policy("stp"), policy("dtp", gate=0.1), policy("stp"), policy("cfg"), policy("og+dtp")])
    assert mixed.ungated_warning().startswith("policy 'stp', 'og+dtp' has no gate")
    assert Policy.stack([policy("dtp", gate=0.1), policy("cfg")]).ungated_warning() is None


def test_a_number_beyond_every_float_is_refused_by_name():
    with pytest.raises(ValueError, match="gate: a number of 401 digits; must be"):
        Policy(transition="dynamic", gate=10**400)
