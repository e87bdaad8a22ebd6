"""Studies of Python objects: a user's own model, loss, data and optimizers."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import thalweg
from tests.lab.small_study import differing, left
from thalweg import lab
from thalweg.errors import InvalidInput
from thalweg.lab.config import parse_spec
from thalweg.lab.config.phases import PhaseSpec, SplitSpec
from thalweg.lab.config.spec import BranchSpec
from thalweg.lab.study import StudyResult, resume, run
from thalweg.problems import Problem

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 3, generator=GENERATOR)
TARGETS = (INPUTS[:, 0] > 0).long()
ROOT = Path(__file__).parents[2]


def net(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def study(**changes: Any) -> lab.Study:
    usual: dict[str, Any] = {
        "problem": lab.Problem(model=net, loss=cross_entropy, train=(INPUTS, TARGETS)),
        "phases": [lab.Phase(torch.optim.SGD, lr=0.1, batch_size=10, steps=6)],
        "branches": {"sgd": lab.Branch(), "bulk": lab.Split(0, 1)},
        "probes": {"loss": 1, "alignment_update": 2},
        "figures": [],
        "k": 1,
    }
    return lab.Study(**{**usual, **changes})


def losses(result: StudyResult, branch: str, seed: int = 0) -> list[float]:
    rows = result.data
    return rows[(rows.branch == branch) & (rows.seed == seed)].loss.dropna().tolist()


def test_a_study_of_ones_own_trains_the_model_that_was_given(quick_path: Path) -> None:
    """Against a loop by hand, with the mini-batches that are all samples."""
    torch.manual_seed(0)
    model = net(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = study(
        problem=lab.Problem(model=model, loss=cross_entropy, train=(INPUTS, TARGETS)),
        phases=[lab.Phase(partial(torch.optim.SGD, lr=0.3), batch_size="all", steps=4)],
        branches={"fast": lab.Branch(lr=0.6)},
        probes={"loss": 1},
    )
    result = lab.run(given, root=quick_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected: list[float] = []
    for rate in (0.3, 0.6):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(4):
            loss = cross_entropy(model(INPUTS), TARGETS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    final = cross_entropy(model(INPUTS), TARGETS).item()
    assert losses(result, "trunk")[:4] == pytest.approx(expected[:4], rel=1e-5)
    assert losses(result, "fast") == pytest.approx([*expected[4:], final], rel=1e-5)


def test_the_folder_is_complete_and_says_what_was_given(
    quick_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = thalweg.run(study(), root=quick_path)
    assert result.exit_code == 0
    assert result.report is not None
    written = tomllib.loads(result.study.spec_text)
    assert written["problem"]["data"]["name"] == "given"
    assert written["problem"]["data"]["samples"] == 40
    assert len(written["problem"]["data"]["fingerprint"]) == 64
    assert written["problem"]["loss"]["source"].startswith("tests.lab.test_in_python.cross_entropy")
    assert written["phases"][0]["optimizer"]["source"] == "torch.optim.sgd.SGD"
    assert written["phases"][0]["optimizer"]["lr"] == 0.1
    assert parse_spec(written).branch_phase("bulk").split == SplitSpec(dominant=0.0)
    assert set(thalweg.load(result.study.path).branch) == {"trunk", "sgd", "bulk"}
    # Done, a study can be judged anew without its objects.
    assert resume(result.study.path).exit_code == 0


def test_without_the_objects_a_study_is_not_continued(quick_path: Path) -> None:
    folder = run(study(), root=quick_path).study
    more = tomllib.loads(folder.spec_text)
    more["seeds"] = [0, 1]
    with pytest.raises(InvalidInput, match=r"problem: .* call thalweg\.lab\.run with the same"):
        run(parse_spec(more), root=quick_path)


def test_the_same_objects_continue_to_the_last_bit(quick_path: Path) -> None:
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    phases = [lab.Phase(momentum, batch_size=10, steps=6)]
    whole = run(study(phases=phases), root=quick_path / "whole")
    stopping = _stop_after(4)
    parted = run(study(phases=phases), root=quick_path / "parted", executor=stopping)
    assert parted.exit_code == 75
    again = run(study(phases=phases), root=quick_path / "parted")
    assert again.exit_code == 0
    assert again.study.name == whole.study.name
    for branch in ("trunk", "sgd", "bulk"):
        assert not differing(left(whole.study, branch), left(again.study, branch))


def _stop_after(steps: int) -> Callable[[Any], Any]:
    """An executor that interrupts the first run at this step."""
    from thalweg.lab.execution.processes import Ending
    from thalweg.lab.execution.schedule import Assignment, Outcome
    from thalweg.lab.training import Run

    def execute(assignment: Assignment) -> Outcome:
        task, asked = assignment.tasks[0], iter(range(steps + 1))
        assert assignment.spec is not None
        run = Run(
            assignment.spec,
            assignment.study,
            task.seed,
            task.branch,
            should_stop=lambda: next(asked) == steps,
        )
        with pytest.raises(thalweg.errors.Interrupted):
            run.execute()
        left = list(assignment.tasks[1:])
        return Outcome({task: Ending(75)}, left, interrupted=True)

    return execute


def test_other_data_parameters_or_code_are_another_study() -> None:
    from thalweg.lab.preparing import study_name

    base = study()
    problem = base.problem
    assert isinstance(problem, lab.Problem)
    names = {
        study_name(replace(base, problem=replace(problem, **change)).spec())
        for change in (
            {},
            {"train": (INPUTS + 1, TARGETS)},
            {"model": lambda: nn.Linear(3, 2)},
            {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
            {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
        )
    }
    assert len(names) == 5 - 1  # a module's settings that its words do not show
    assert study_name(study().spec()) == study_name(base.spec())


def test_a_data_set_and_double_precision_are_taken_as_they_are(quick_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    pairs = TensorDataset(INPUTS.double(), TARGETS)
    problem = lab.Problem(model=model, loss=cross_entropy, train=pairs, test=pairs)
    spec = study(problem=problem).spec()
    assert spec.dtype == "float64"
    built = spec.problem.data.problem(0, torch.float64, "cpu")  # type: ignore[attr-defined]
    assert torch.equal(built.train[0], INPUTS.double())
    assert torch.equal(built.train[1], TARGETS)
    assert built.num_classes == 2
    result = run(study(problem=problem, probes={"loss": 2, "test": 2}), root=quick_path)
    assert result.data.test_accuracy.notna().any()


def test_a_module_is_the_start_of_every_seed_and_a_function_of_its_own() -> None:
    one = lab.Problem(model=nn.Linear(3, 2), loss=cross_entropy, train=(INPUTS, TARGETS))
    assert _first(one.built(0)).equal(_first(one.built(1)))
    each = replace(one, model=lambda: nn.Linear(3, 2))
    assert _first(each.built(0)).equal(_first(each.built(0)))
    assert not _first(each.built(0)).equal(_first(each.built(1)))
    seen: list[int] = []
    replace(one, model=lambda seed: seen.append(seed) or nn.Linear(3, 2)).built(7)
    assert seen == [7]


def _first(problem: Problem) -> Tensor:
    return next(problem.model.parameters())


def test_optimizers_can_be_names_classes_and_functions() -> None:
    def two_rates(parameters: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.4}]
        return torch.optim.SGD(groups, lr=0.2)

    spec = study(
        phases=[lab.Phase("sgd", lr=0.1, steps=3)],
        branches={
            "table": lab.Branch(optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.5}),
            "class": lab.Branch(optimizer=torch.optim.Adagrad),
            "function": lab.Branch(optimizer=two_rates),
            "faster": lab.Branch(lr=1.0, starts_from="function"),
        },
    ).spec()
    assert spec.phases[0].optimizer == spec.branch_phase("table").optimizer.model_copy(
        update={"momentum": 0.0}
    )
    rates = {name: spec.branch_phase(name).optimizer.lr for name in ("class", "function", "faster")}
    assert rates == {"class": 0.01, "function": 0.2, "faster": 1.0}
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    built = spec.branch_phase("faster").optimizer.build(parameters)
    assert [group["lr"] for group in built.param_groups] == [1.0, 2.0]


def test_two_functions_of_one_line_are_two_optimizers() -> None:
    both = [lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.Adam(p, 0.1)]
    spec = study(
        phases=[lab.Phase(one, steps=2, name=f"p{n}") for n, one in enumerate(both)]
    ).spec()
    parameters = [torch.zeros(2, requires_grad=True)]
    kinds = [type(phase.optimizer.build(parameters)) for phase in spec.phases]
    assert kinds == [torch.optim.SGD, torch.optim.Adam]


def test_a_problem_can_be_the_table_of_a_spec() -> None:
    table = {"data": "digits", "samples": 50, "model": "mlp", "loss": "mse"}
    spec = study(problem=table, phases=[lab.Phase("sgd", lr=0.1, steps=2)]).spec()
    assert spec.problem.samples == 50
    assert not spec.holds_objects
    assert study().spec().holds_objects


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": 3}, r"problem: got 'int', allowed: a lab\.Problem"),
        (
            {"phases": [lab.Phase("sgd", lr=-1.0, steps=2)]},
            r"study study: phases\.0\.optimizer\.lr",
        ),
        ({"phases": [lab.Phase(steps=2)]}, r"phases\.0\.optimizer: missing"),
        (
            {"phases": [lab.Phase(print, steps=2)]},
            r"optimizer builtins\.print: .*; give a function",
        ),
        ({"branches": {"a": lab.Branch(starts_from="b")}}, r"branches\.a\.starts_from: got 'b'"),
        ({"settings": {"thraeds": 2}}, r"thraeds: no such key .* did you mean 'threads'"),
    ],
)
def test_mistakes_are_told_as_in_a_file(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        study(**changes).spec()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": 3}, "model: got 'int', allowed: a torch.nn.Module, or a function"),
        ({"train": INPUTS}, "train: got 'Tensor', allowed: .inputs, targets"),
        ({"train": (INPUTS, TARGETS[1:])}, "train: got '40 inputs and 39 targets'"),
    ],
)
def test_what_is_no_problem_is_refused(parts: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"model": net, "loss": cross_entropy, "train": (INPUTS, TARGETS)}
    with pytest.raises(InvalidInput, match=message):
        lab.Problem(**{**usual, **parts}).built(0)


def test_the_words_are_those_of_a_spec() -> None:
    assert {f.name for f in fields(lab.Phase)} == {*PhaseSpec.model_fields, "lr"}
    assert {f.name for f in fields(lab.Branch)} == {*BranchSpec.model_fields, "lr"}
    assert {f.name for f in fields(lab.Split)} == {*SplitSpec.model_fields}


def test_run_takes_a_file_and_its_former_name_is_understood(quick_path: Path) -> None:
    table = {
        "data": "digits",
        "samples": 40,
        "model": {"name": "mlp", "hidden": [3]},
        "loss": "mse",
    }
    made = study(
        problem=table, phases=[lab.Phase("sgd", lr=0.1, batch_size=10, steps=3)], probes={"loss": 1}
    )
    file = quick_path / "mine.toml"
    file.write_text(thalweg.lab.config.dump_spec(made.spec()))
    result = lab.run(file, overrides=["--seeds", "3"], root=quick_path, executor="inline")
    assert set(result.data.seed) == {3}
    with pytest.warns(DeprecationWarning, match=r"run_study is called thalweg\.lab\.run now"):
        assert lab.run_study is lab.run  # type: ignore[attr-defined]
    assert thalweg.run is lab.run
    with pytest.raises(InvalidInput, match=r"overrides: .* none with a spec"):
        lab.run(made.spec(), overrides=["--seeds", "3"])


def test_the_example_of_the_page_runs(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "lab-from-python.md").read_text(encoding="utf-8")
    first, _, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shorter = first.replace("steps=60", "steps=8").replace("steps=40", "steps=8")
    shorter = shorter.replace("seeds=[0, 1]", "seeds=[0]")
    monkeypatch.chdir(quick_path)
    names: dict[str, Any] = {}
    exec(shorter, names)
    assert set(names["result"].data.branch) == {"trunk", "sgd", "dominant", "bulk", "adam"}
    from thalweg.registry import datasets, models

    exec(second, names)
    try:
        built = models.find("two-layers")(width=32)
        assert built.width == 32
        assert datasets.find("xor")(samples=100).build().num_classes == 2
    finally:
        del models["two-layers"], datasets["xor"]
