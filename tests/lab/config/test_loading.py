from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.lab.stand_ins import RAW, stand_ins
from thalweg.errors import InvalidInput, without_controls
from thalweg.lab.config.loading import (
    PROBLEM_SPECS,
    PhaseSpec,
    Spec,
    SplitSpec,
    builtin_specs,
    check_names,
    dump_spec,
    load_spec,
    parse_spec,
    spec_hash,
)
from thalweg.lab.config.optimizers import SGD
from thalweg.lab.config.overrides import apply_overrides
from thalweg.lab.store.durable import is_folder_name

__all__ = ["stand_ins"]

pytestmark = pytest.mark.usefixtures("stand_ins")

PHASE_KEYS = (
    "name, optimizer, schedule, warmup_steps, batch_size, clip_norm, noise, split, local, steps, "
    "epochs, until_alignment, alignment_ema, until_loss"
)
COUNT = "an integer >= 1"
NAME = (
    "at most 64 of letters, digits, '-', '_' and '.', a letter or digit first, no '.' last, and no"
    " name that Windows keeps for itself (con, nul, com1, ...)"
)


def spec_with(**values: Any) -> Spec:
    """The small spec with values at key paths whose dots are written `__`."""
    return parse_spec(RAW, overrides={key.replace("__", "."): v for key, v in values.items()})


def message_of(overrides: dict[str, Any]) -> str:
    """The error of the small spec with these values written into its file."""
    changed, _ = apply_overrides(RAW, overrides, Spec)
    with pytest.raises(InvalidInput) as caught:
        parse_spec(changed, source="my.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sed", 1, "sed: no such key (got 1), allowed: name, description, seeds, device, dtype, "
         "threads, processes, problem, subspace, phases, branches, probes, claims, figures, "
         "checkpoint, initial_checkpoint, smoke; did you mean 'seeds'?"),
        ("phases.0.lr", 0.1, f"phases.0.lr: no such key (got 0.1), allowed: {PHASE_KEYS}; "
         "did you mean 'phases.0.optimizer.lr'?"),
        ("phases.0.optimizer.momentun", 0.9, "phases.0.optimizer.momentun: no such key (got 0.9), "
         "allowed: name, lr, grad_power, block_rates, momentum, dampening, weight_decay, nesterov; "
         "did you mean 'momentum'?"),
        ("phases.0.optimizer.lr", -0.1, "phases.0.optimizer.lr: got -0.1, allowed: a number > 0"),
        ("phases.0.optimizer.lr", "0.1",
         "phases.0.optimizer.lr: got '0.1', allowed: a number > 0"),
        ("phases.0.optimizer.lr", float("nan"),
         "phases.0.optimizer.lr: got nan, allowed: a number > 0"),
        ("phases.0.optimizer.momentum", 1.0,
         "phases.0.optimizer.momentum: got 1.0, allowed: a number >= 0 and < 1"),
        ("phases.0.optimizer.nesterov", True, "phases.0.optimizer.nesterov: got true, "
         "allowed: false when momentum is 0; give a momentum"),
        ("phases.0.optimizer", "sgdd", "phases.0.optimizer: got 'sgdd', allowed: one of adam, "
         "adamw, dion, muon, rmsprop, sam, sgd; did you mean 'sgd'?"),
        ("phases.0.optimizer", {"name": "Adam_W", "lr": 1.0}, "phases.0.optimizer.name: got "
         "'Adam_W', allowed: one of adam, adamw, dion, muon, rmsprop, sam, sgd; did you mean "
         "'adamw'?"),
        ("phases.0.optimizer", {"lr": 0.1}, "phases.0.optimizer.name: missing, allowed: one of "
         "adam, adamw, dion, muon, rmsprop, sam, sgd"),
        ("phases.0.optimizer", "adam", "phases.0.optimizer.lr: missing, allowed: a number > 0"),
        ("phases.0.optimizer", {"name": "adam", "lr": 0.1, "betas": [0.9]},
         "phases.0.optimizer.betas.1: missing, allowed: a number >= 0 and < 1"),
        ("phases.0.schedule", {"name": "cosine", "final": 2},
         "phases.0.schedule.final: got 2, allowed: a number >= 0 and <= 1"),
        ("phases.0.batch_size", 0, f"phases.0.batch_size: got 0, allowed: {COUNT} or 'all'"),
        ("phases.0.batch_size", "al",
         f"phases.0.batch_size: got 'al', allowed: {COUNT} or 'all'; did you mean 'all'?"),
        ("phases.0.batch_size", 1001,
         "phases.0.batch_size: got 1001, allowed: at most problem.samples, 1000, or 'all'"),
        ("phases.0.steps", 1e3, "phases.0.steps: got 1000.0, allowed: an integer >= 0"),
        ("phases.0.steps", True, "phases.0.steps: got true, allowed: an integer >= 0"),
        ("phases.0.warmup_steps", 101,
         "phases.0.warmup_steps: got 101, allowed: at most the phase's steps, 100"),
        ("phases.0.until_alignment", 1.5,
         "phases.0.until_alignment: got 1.5, allowed: a number > 0 and <= 1"),
        ("phases.0.split.basis", "forzen", "phases.0.split.basis: got 'forzen', "
         "allowed: one of 'live', 'frozen'; did you mean 'frozen'?"),
        ("phases.0.split.basis", "frozen", "phases.0.split.basis: got 'frozen', "
         "allowed: 'live' in the trunk, which has no branch point"),
        ("phases", [], "phases: got [], allowed: a non-empty array, each a table"),
        ("phases.0", 3, "phases.0: got 3, allowed: a table"),
        ("seeds", [], "seeds: got [], allowed: a non-empty array, each an integer from 0 to "
         "2^63 - 1"),
        ("seeds", [0, -1], "seeds.1: got -1, allowed: an integer from 0 to 2^63 - 1"),
        ("seeds", [1, 1], "seeds: got [1, 1], allowed: each seed once"),
        ("seeds", 1, "seeds: got 1, allowed: a non-empty array, each an integer from 0 to "
         "2^63 - 1"),
        ("name", "../up", f"name: got '../up', allowed: {NAME}"),
        ("name", "a" * 65, f"name: got '{'a' * 65}', allowed: {NAME}"),
        ("device", "gpu", "device: got 'gpu', allowed: 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        ("dtype", "float", "dtype: got 'float', allowed: one of 'float32', 'float64'; "
         "did you mean 'float64'?"),
        ("threads", 0, f"threads: got 0, allowed: {COUNT} and <= 1024"),
        ("problem", 3, "problem: got 3, allowed: a table"),
        ("problem.model.name", "mpl",
         "problem.model.name: got 'mpl', allowed: one of cnn, mlp; did you mean 'mlp'?"),
        ("problem.model.hidden", [20, "x"],
         f"problem.model.hidden.1: got 'x', allowed: {COUNT}"),
        ("problem.model.hidden", 20,
         f"problem.model.hidden: got 20, allowed: an array, each {COUNT}"),
        ("problem.preprocess", "standardise", "problem.preprocess: got 'standardise', allowed: "
         "one of 'none', 'unit', 'standardize', 'standardize-channel'; "
         "did you mean 'standardize'?"),
        ("subspace.k", 0, f"subspace.k: got 0, allowed: {COUNT}, 'classes' or 'gap'"),
        ("subspace.k", "clases", f"subspace.k: got 'clases', allowed: {COUNT}, 'classes' or "
         "'gap'; did you mean 'classes'?"),
        ("subspace.error", 0, "subspace.error: got 0, allowed: a number > 0 and < 1"),
        ("branches.trunk", {}, "branches.trunk: got 'trunk', allowed: a name whose folder is not "
         "that of the trunk"),
        ("branches.a/b", {}, f"branches: got the name 'a/b', allowed: {NAME}"),
        ("branches.x", 1, "branches.x: got 1, allowed: a table"),
        ("branches.x", {"split": {"bulc": 1}}, "branches.x.split.bulc: no such key (got 1), "
         "allowed: dominant, bulk, dominant_end, bulk_end, basis, metric, source; "
         "did you mean 'bulk'?"),
        ("branches.x", {"optimizer": {"lr": 0}},
         "branches.x.optimizer.lr: got 0, allowed: a number > 0"),
        ("branches.x", {"batch_size": 2000}, "branches.x.batch_size: got 2000, allowed: at most "
         "problem.samples, 1000, or 'all'"),
        ("branches.x", {"steps": 5, "warmup_steps": 6},
         "branches.x.warmup_steps: got 6, allowed: at most the phase's steps, 5"),
        ("branches.x", {"steps": 5, "epochs": 6},
         "branches.x.epochs: got 6, allowed: either steps or epochs, not both"),
        ("probes.loss", 0, f"probes.loss: got 0, allowed: {COUNT}"),
        ("claims", ["a", "a"], "claims: got 'a', allowed: each claim once for the same branches"),
        ("checkpoint.every_seconds", -1,
         "checkpoint.every_seconds: got -1, allowed: a number >= 0"),
    ],
)  # fmt: skip
def test_a_bad_value_gets_one_line_with_key_given_allowed_and_nearest(
    key: str, value: Any, message: str
):
    assert message_of({key: value}) == f"my.toml: {message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases.0.steps": "unset"}, "phases.0.steps: missing, allowed: an integer >= 0; "
         "a phase ends by steps or by epochs"),
        ({"problem.samples": "unset", "problem.balanced": True},
         "problem.balanced: got true, allowed: false without samples; give samples"),
        ({"device": "mps", "dtype": "float64"},
         "dtype: got 'float64', allowed: 'float32' on device 'mps'"),
        ({"branches.sgd": {}, "branches.SGD": {}}, "branches.SGD: got 'SGD', allowed: a name "
         "whose folder is not that of branch 'sgd'"),
        ({"phases": [RAW["phases"][0]] * 2}, "phases.1.name: got 'train', allowed: a name that "
         "no earlier phase has"),
        ({"problem.model": "unset"}, "problem.model: missing, allowed: one of cnn, mlp"),
        ({"problem": "unset"}, "problem: missing, allowed: a table"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_name_the_one_at_fault(
    values: dict[str, Any], message: str
):
    assert message_of(values) == f"my.toml: {message}"


def test_every_mistake_is_told_at_once():
    message = message_of({"sed": 1, "phases.0.optimizer.lr": 0, "problem.model.name": "x"})
    assert [line.split(":")[1] for line in message.split("\n")] == [
        " problem.model.name",
        " phases.0.optimizer.lr",
        " sed",
    ]


def test_a_long_value_is_cut():
    message = message_of({"description": list(range(1000))})
    assert message.startswith("my.toml: description: got [0, 1, 2, ")
    assert message.endswith("..., allowed: text")
    assert len(message) < 160


def test_a_mistake_on_the_command_line_is_told_as_such():
    for words in (["--phases.0.steps", "-1"], ["--phases.0.optimzer.lr", "0"], ["--lr=-1"]):
        with pytest.raises(InvalidInput, match=r"^command line: phases\.0"):
            parse_spec(RAW, source="my.toml", overrides=words)


def test_a_message_never_shows_pydantic():
    message = message_of({"subspace.k": 1.5, "phases.0.batch_size": [], "phases.0.schedule": 1})
    for internal in ("literal", "constrained", "function", "url", "int_type", "Input should"):
        assert internal not in message
    assert len(message.split("\n")) == 3


def test_defaults_fill_what_the_file_leaves_out():
    spec = parse_spec(RAW)
    assert (spec.name, spec.seeds, spec.device, spec.dtype) == ("main", (0,), "auto", "float32")
    assert spec.phases[0].optimizer == SGD(lr=0.05)
    assert spec.phases[0].schedule.registered_name == "constant"
    assert spec.problem.model.hidden == (20, 10)  # type: ignore[attr-defined]
    assert spec.problem.loss.factor == 0.5  # type: ignore[attr-defined]


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path):
    path = tmp_path / "my.toml"
    path.write_text(dump_spec(spec_with(threads=3, subspace__k=4)))
    assert load_spec(path).threads == 3
    spec = load_spec(path, ["--subspace.k", "5"])
    assert (spec.subspace.k, spec.threads, spec.subspace.every) == (5, 3, 1)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError):
        parse_spec(RAW).threads = 2  # type: ignore[misc]


def test_what_was_read_is_left_as_it_was():
    before = copy.deepcopy(RAW)
    spec_with(threads=2, phases__0__optimizer__lr=1.0)
    assert before == RAW


def test_a_branch_takes_from_the_trunks_last_phase_what_it_does_not_say():
    spec = spec_with(
        phases__0__batch_size=20,
        phases__0__clip_norm=1.0,
        phases__0__optimizer__momentum=0.9,
        branches__plain={},
    )
    expected = spec.phases[0].model_copy(update={"name": "plain"})
    assert spec.branch_phase("plain") == expected


def test_a_branch_keeps_every_word_of_its_own():
    own = {
        "optimizer": {"name": "adam", "lr": 0.001},
        "schedule": "cosine",
        "warmup_steps": 3,
        "batch_size": "all",
        "clip_norm": 2.0,
        "split": {"dominant": 0, "bulk": 2, "basis": "frozen"},
        "epochs": 4,
        "until_alignment": 0.5,
        "alignment_ema": 0.8,
        "until_loss": 0.1,
    }
    phase = spec_with(branches__x=own, phases__0__clip_norm=1.0).branch_phase("x")
    assert phase == PhaseSpec.model_validate({"name": "x", **own})


def test_a_branch_does_not_take_rules_or_warm_up_from_the_trunk():
    spec = spec_with(
        phases__0__until_alignment=0.95,
        phases__0__until_loss=0.1,
        phases__0__warmup_steps=10,
        branches__x={},
    )
    phase = spec.branch_phase("x")
    assert (phase.until_alignment, phase.until_loss, phase.warmup_steps) == (None, None, 0)
    assert phase.steps == 100


def test_a_branch_can_train_for_epochs_where_the_trunk_trains_for_steps():
    phase = spec_with(branches__x={"epochs": 2}).branch_phase("x")
    assert (phase.steps, phase.epochs) == (None, 2)


def test_a_branch_can_leave_out_the_trunks_clipping():
    spec = spec_with(phases__0__clip_norm=1.0, branches__x={"clip_norm": "off"}, branches__y={})
    assert spec.branch_phase("x").clip_norm is None
    assert spec.branch_phase("y").clip_norm == 1.0


def test_a_branch_can_change_one_setting_of_the_trunks_optimizer():
    spec = spec_with(phases__0__optimizer__momentum=0.9, branches__fast={"optimizer": {"lr": 0.5}})
    assert spec.branch_phase("fast").optimizer == SGD(lr=0.5, momentum=0.9)
    other = spec_with(branches__fast={"optimizer": {"name": "sgd", "lr": 0.5}})
    assert other.branch_phase("fast").optimizer == SGD(lr=0.5)


def test_a_split_that_is_not_full_keeps_the_default_of_the_rest():
    phase = spec_with(branches__x={"split": {"bulk": 0}}).branch_phase("x")
    assert phase.split == SplitSpec(dominant=1.0, bulk=0.0, basis="live")


def test_the_bound_of_a_phase_in_steps():
    phase = parse_spec(RAW).phases[0]
    epochs = phase.model_copy(update={"steps": None, "epochs": 3, "batch_size": 30})
    assert phase.most_steps(1000) == 100
    assert epochs.most_steps(100) == 3 * 4
    assert epochs.model_copy(update={"batch_size": "all"}).most_steps(100) == 3


def test_the_learning_rate_of_a_phase_has_its_schedule_and_warm_up():
    phase = spec_with(phases__0__warmup_steps=10, phases__0__schedule="linear").phases[0]
    assert phase.learning_rate(0, 100) == pytest.approx(0.005)
    assert phase.learning_rate(10, 100) == pytest.approx(0.05)
    assert phase.learning_rate(55, 100) == pytest.approx(0.025)


NUMBERS = st.floats(1e-300, 1e300) | st.integers(1, 2**60)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(
    lambda text: text == without_controls(text)
)
SPLITS = st.fixed_dictionaries(
    {}, optional={"dominant": NUMBERS, "bulk": NUMBERS, "basis": st.sampled_from(["live"])}
)


@settings(max_examples=30, deadline=None)
@given(
    lr=NUMBERS,
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, unique=True),
    description=TEXTS,
    split=st.none() | SPLITS,
    until_loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    hidden=st.lists(st.integers(1, 9)),
    batch_size=st.integers(1, 1000) | st.just("all"),
    branches=st.dictionaries(
        st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9_-])?", fullmatch=True).filter(
            lambda n: n != "trunk" and is_folder_name(n)
        ),
        st.fixed_dictionaries({}, optional={"split": SPLITS, "until_loss": NUMBERS}),
        max_size=3,
    ),
    probes=st.dictionaries(TEXTS, st.integers(1, 99), max_size=3),
)
def test_what_is_written_is_read_back_exactly(**values: Any):
    raw = copy.deepcopy(RAW)
    raw["problem"]["model"]["hidden"] = values["hidden"]
    raw["phases"][0]["optimizer"]["lr"] = values["lr"]
    for key in ("split", "until_loss", "batch_size"):
        if values[key] is not None:
            raw["phases"][0][key] = values[key]
    for key in ("seeds", "description", "branches", "probes"):
        raw[key] = values[key]
    spec = parse_spec(raw)
    again = parse_spec(tomllib.loads(dump_spec(spec)))
    assert again == spec
    assert dump_spec(again) == dump_spec(spec)
    assert spec_hash(again) == spec_hash(spec)


FULL: dict[str, Any] = {"branches.sgd": {"steps": 50}, "branches.bulk": {"split": {"dominant": 0}}}


def hash_with(**values: Any) -> str:
    return spec_hash(parse_spec(RAW, overrides={**FULL, **values}))


def test_the_hash_is_stable():
    assert hash_with() == "556f152b"


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": [5, 6]},
        {"name": "other"},
        {"description": "other"},
        {"threads": 2},
        {"claims": ["gradient-aligns"]},
        {"checkpoint.every_steps": 7},
        {"branches.sgd.steps": 500},
        {"branches.sgd.steps": "unset"},
        {"branches.bulk.epochs": 3},
        {"phases.0.name": "other"},
        {"problem.chunk_size": 10},
        {"problem.vectorize_up_to": 0},
        {"problem.data.data_dir": "/elsewhere"},
        {"branches.sgd.batch_size": 50},
    ],
    ids=str,
)
def test_the_hash_ignores_what_does_not_change_the_numbers(change: dict[str, Any]):
    assert hash_with(**change) == hash_with()


@pytest.mark.parametrize(
    "change",
    [
        {"phases.0.optimizer.lr": 0.051},
        {"phases.0.steps": 101},
        {"phases.0.until_alignment": 0.95},
        {"problem.samples": 999},
        {"problem.model.hidden": [20, 11]},
        {"problem.loss": {"name": "mse", "factor": 1.0}},
        {"problem.preprocess": "unit"},
        {"subspace.k": 3},
        {"subspace.seed": 1},
        {"dtype": "float64"},
        {"device": "cpu"},
        {"branches.sgd.optimizer.lr": 0.1},
        {"branches.bulk.split.bulk": 1.5},
        {"branches.bulk": "unset"},
        {"probes.loss": 5},
        {"branches.sgd.probes": {"loss": 5}},
        {"initial_checkpoint": "theta.safetensors"},
    ],
    ids=str,
)
def test_the_hash_changes_with_what_changes_the_numbers(change: dict[str, Any]):
    assert hash_with(**change) != hash_with()


def test_the_bound_of_a_branch_is_hashed_where_the_learning_rate_depends_on_it():
    cosine = {"branches.sgd.schedule": "cosine"}
    assert hash_with(**cosine, **{"branches.sgd.steps": 60}) != hash_with(**cosine)


def test_the_order_of_branches_and_probes_is_not_hashed():
    one = parse_spec(RAW, overrides={"branches": {"a": {}, "b": {}}, "probes": {"x": 1, "y": 2}})
    two = parse_spec(RAW, overrides={"branches": {"b": {}, "a": {}}, "probes": {"y": 2, "x": 1}})
    assert spec_hash(one) == spec_hash(two)


def test_names_of_probes_and_claims_are_checked_against_the_known_ones():
    spec = spec_with(probes={"loss": 1, "shrapness": 2}, claims=["gradient-aligned"])
    check_names(spec)
    check_names(spec, probes=["loss", "shrapness"])
    with pytest.raises(InvalidInput) as caught:
        check_names(spec, probes=["loss", "sharpness"], claims=["gradient-aligns"], source="a.toml")
    assert str(caught.value).split("\n") == [
        "a.toml: probes: no probe 'shrapness', allowed: loss, sharpness; did you mean 'sharpness'?",
        "a.toml: claims: no claim 'gradient-aligned', allowed: gradient-aligns; "
        "did you mean 'gradient-aligns'?",
    ]
    of_a_branch = spec_with(probes={"loss": 1}, branches={"a": {"probes": {"los": 1}}})
    with pytest.raises(InvalidInput, match="probes: no probe 'los'"):
        check_names(of_a_branch, probes=["loss"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seeds = [0]\nname = \n", "line 2, column 8: Invalid value"),
        (b"seeds = [0", "line 1, column 11: Unclosed array, at the end of the file"),
        (b"a = 1\na = 2\n", "line 2, column 6: Cannot overwrite a value"),
    ],
)
def test_a_mistake_in_toml_is_told_with_line_and_column(
    tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        load_spec(path)
    assert str(caught.value) == f"{path}, {message}"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"none\.toml: no such file; give a TOML file or a bui"):
        load_spec(tmp_path / "none.toml")
    with pytest.raises(InvalidInput, match=r": cannot be read \(Is a directory\)$"):
        load_spec(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(InvalidInput, match=r"latin\.toml: not a text in UTF-8 \(byte 8\)$"):
        load_spec(str(tmp_path / "latin.toml"))


def test_an_unknown_built_in_name_gives_the_nearest():
    with pytest.raises(InvalidInput, match=r"^spec: got 'digit', .*; did you mean 'digits'\?$"):
        load_spec("digit")


def test_every_problem_has_its_spec():
    assert set(PROBLEM_SPECS.values()) <= set(builtin_specs())
