"""Whatever goes wrong in a report, the training goes on as it would have without `watch`."""

from __future__ import annotations

import copy
import csv
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import ProcessFailed, Reduction
from thalweg.measure import watcher as watcher_module
from thalweg.measure.agreement import all_or_none
from thalweg.measure.sinks import CSV, WatchWarning, reason_of, warnings_that_stop_nothing
from thalweg.measure.watch import watch
from thalweg.measure.watcher import COLUMNS, Watcher
from thalweg.registry import probes
from thalweg.spectrum import gap
from thalweg.spectrum.gap import GapClosed
from thalweg.tracking.tracker import SubspaceTracker

LOSS = nn.CrossEntropyLoss()
EMPTY = "this report is empty"


@pytest.fixture(autouse=True)
def no_gap_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap of these small problems closes here and there: of no matter."""
    monkeypatch.setattr(gap, "CLOSED", math.inf)


class Net(nn.Module):
    """A network whose passes over the watched data (24 samples or 8) can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(5)
        self.broken: Callable[[], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.broken is not None and not self.training:
            self.broken()
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def raises(error: BaseException) -> Callable[[], None]:
    def broken() -> None:
        # Random numbers first, so that those of the training would be others.
        _ = torch.rand(3), random.random(), np.random.random()
        raise error

    return broken


@contextmanager
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield


def train(
    arrange: Callable[[Net, torch.optim.Optimizer], Watcher | None],
    before: Callable[[Net, torch.optim.Optimizer, int], None] = lambda *_: None,
    steps: int = 6,
    kind: Any = torch.optim.Adam,
) -> tuple[dict[str, Any], Watcher | None]:
    """Everything that a training holds at its end; batches come from all three generators."""
    with seeded():
        model = Net()
        optimizer = kind(model.parameters(), lr=0.05)
        watcher = arrange(model, optimizer)
        inputs, target = data()
        for step in range(steps):
            before(model, optimizer, step)
            noise = random.random() + float(np.random.random())
            chosen = torch.randint(0, 24, (8,))
            parameter = next(model.parameters())
            batch = (inputs[chosen] + 0.1 * noise).to(parameter)
            optimizer.zero_grad()
            LOSS(model(batch), target[chosen]).backward()
            optimizer.step()
        held = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        }
    return copy.deepcopy(held), watcher


def same(first: Any, second: Any) -> bool:
    if isinstance(first, (Tensor, np.ndarray)):
        return first.dtype == second.dtype and bool(
            torch.equal(first, second) if isinstance(first, Tensor) else (first == second).all()
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def observe(model: Net, optimizer: torch.optim.Optimizer, **options: Any) -> Watcher:
    options = {"every": 1, "k": 2, "quiet": True} | options
    return watch(model, LOSS, data(), optimizer, **options)


def watched_like_unwatched(
    before: Callable[[Net, torch.optim.Optimizer, int], None] = lambda *_: None, **options: Any
) -> Watcher:
    """Train with and without, and hand over the watcher, if both trainings are one."""
    steps, kind = options.pop("steps", 6), options.pop("kind", torch.optim.Adam)
    alone, _ = train(lambda *_: None, before, steps, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, watcher = train(lambda m, o: observe(m, o, **options), before, steps, kind)
    for part, value in alone.items():
        assert same(value, found[part]), part
    assert watcher is not None
    return watcher


def failures(watcher: Watcher) -> dict[int, str]:
    return {row["step"]: row["failure"] for row in watcher.history if row["failure"]}


class Unlike(Exception):
    """None of torch's or Python's, so that it is told as it is."""


class Weird(Exception):
    def __str__(self) -> str:
        raise RuntimeError


ERRORS = {
    "RuntimeError": RuntimeError("derivative for aten::some_backward is not implemented"),
    "Weird": Weird(),
    "Thalweg's own": InvalidInput("the loss draws random numbers"),
    "NotImplementedError": NotImplementedError('"geqrf_cpu" not implemented'),
    "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory"),
    "MemoryError": MemoryError(),
    "RecursionError": RecursionError(),
    "StopIteration": StopIteration(),
    "AssertionError": AssertionError("shape"),
    "ExceptionGroup": ExceptionGroup("several", [ValueError("one")]),
}


@pytest.mark.parametrize("name", few(3, ERRORS))
@pytest.mark.parametrize("first", few(1, [2, 0]))
def test_an_error_of_any_class_is_a_row_and_not_the_end(name: str, first: int) -> None:
    def before(model: Net, _: Any, step: int) -> None:
        model.broken = raises(ERRORS[name]) if first <= step < first + 2 else None

    watcher = watched_like_unwatched(before)
    found = failures(watcher)
    assert list(found) == [first, first + 1]
    words = "draws random numbers" if name == "Thalweg's own" else name
    assert all(words in reason and "\n" not in reason for reason in found.values())
    assert [row["step"] for row in watcher.history] == list(range(6))
    # The next is tried, and gives numbers.
    assert all((row["sharpness"] is None) == (row["step"] in found) for row in watcher.history)


def test_it_is_a_warning_that_names_step_and_reason() -> None:
    def before(model: Net, _: Any, step: int) -> None:
        model.broken = raises(RuntimeError("no kernel")) if step == 1 else None

    with pytest.warns(WatchWarning, match=f"step 1: .*RuntimeError: no kernel; .*{EMPTY}") as seen:
        train(observe, before, 4, torch.optim.SGD)
    assert sum(each.category is WatchWarning for each in seen) == 1


def test_after_three_in_a_row_reports_end_and_it_is_said_once() -> None:
    calls: list[int] = []

    def before(model: Net, _: Any, step: int) -> None:
        def broken() -> None:
            calls.append(step)
            raise RuntimeError("lost")

        model.broken = broken if step != 2 else None

    with pytest.warns(WatchWarning) as seen:
        _, watcher = train(observe, before, 9)
    assert watcher is not None
    said = [str(each.message) for each in seen if each.category is WatchWarning]
    assert list(failures(watcher)) == [0, 1, 3, 4, 5]
    assert [row["step"] for row in watcher.history] == [0, 1, 2, 3, 4, 5]
    assert sum("3 reports in a row failed" in line for line in said) == 1
    assert len(said) == 6
    assert calls == [0, 1, 3, 4, 5]
    assert (watcher.ended, watcher.step) == (True, 9)
    assert repr(watcher) == "Watcher(ended, every=1, step=9, reports=6)"
    watched_like_unwatched(before, steps=9)


def test_warnings_turned_into_errors_end_neither_training_nor_report(
    capsys: pytest.CaptureFixture,
) -> None:
    def before(model: Net, _: Any, step: int) -> None:
        def broken() -> None:
            warnings.warn("gap", GapClosed, stacklevel=1)
            if step in (1, 2, 3):
                raise RuntimeError("lost")

        model.broken = broken

    alone, _ = train(lambda *_: None, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, watcher = train(observe, before)
    for part, value in alone.items():
        assert same(value, found[part]), part
    assert watcher is not None
    assert list(failures(watcher)) == [1, 2, 3]
    assert watcher.history[0]["sharpness"] > 0
    said = capsys.readouterr().err
    assert "step 1: the model (Net) fails in the forward pass: RuntimeError: lost" in said
    assert "3 reports in a row failed" in said
    assert said.count("GapClosed: gap") == 1


def test_warnings_of_a_report_reach_the_user_where_none_is_an_error() -> None:
    def before(model: Net, _: Any, step: int) -> None:
        model.broken = lambda: warnings.warn("gap", GapClosed, stacklevel=1)

    with pytest.warns(GapClosed, match="gap"):
        train(observe, before, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        with warnings_that_stop_nothing():
            warnings.warn("plain", stacklevel=1)
    assert [str(each.message) for each in caught] == ["plain"]


def test_where_warnings_cannot_be_shown_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def before(model: Net, _: Any, step: int) -> None:
        model.broken = raises(RuntimeError("lost")) if step == 1 else None

    def showwarning(*_: Any) -> None:
        raise ValueError

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", showwarning)
        monkeypatch.setattr(sys, "stderr", None)
        _, watcher = train(lambda m, o: observe(m, o, quiet=False), before, 3)
    assert watcher is not None
    assert list(failures(watcher)) == [1]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_passes_and_leaves_nothing_half_done(interrupt: type[BaseException]) -> None:
    with seeded():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = observe(model, optimizer)
        weights = copy.deepcopy(model.state_dict())
        inputs, target = data()
        LOSS(model(inputs), target).backward()
        model.load_state_dict(weights)
        model.broken = raises(interrupt())
        generators = torch.get_rng_state(), random.getstate()
        with pytest.raises(interrupt):
            optimizer.step()
        assert same(weights, model.state_dict())
        assert same(generators, (torch.get_rng_state(), random.getstate()))
        model.broken = None
        optimizer.step()
    assert (watcher.step, [row["failure"] for row in watcher.history]) == (1, [None])


@pytest.mark.parametrize("probe", few(1, ["sharpness", "loss", "effective_learning_rates"]))
def test_a_probe_that_fails_after_the_step(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Broken:
        def measure(self, state: Any) -> Any:
            steps.append(state.step)
            if state.step in (0, 1):
                _ = torch.rand(2)
                raise KeyError("column")
            return original.measure(state)

    original = probes[probe]
    monkeypatch.setitem(probes, probe, Broken())
    watcher = watched_like_unwatched()
    assert failures(watcher) == {0: "KeyError: 'column'", 1: "KeyError: 'column'"}
    assert steps == list(range(6))
    assert watcher.history[0]["effective_lr_bulk"] is None
    assert watcher.history[2]["sharpness"] > 0


def test_a_source_that_fails_in_the_middle_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = SubspaceTracker.update, []

    def update(self: SubspaceTracker, theta: Any = None, vector: Any = None) -> Any:
        calls.append(len(calls))
        found = original(self, theta, vector)
        if len(calls) == 3:
            # As if memory had ended half way.
            self._anchors = None  # type: ignore[assignment]
            self._step = None
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(SubspaceTracker, "update", update)
    watcher = watched_like_unwatched()
    assert failures(watcher) == {2: "OutOfMemoryError"}
    solved = SubspaceTracker(watcher.objective, 2, exact=True)
    expected = float(solved.update().eigenvalues[0])
    source: Any = watcher.source
    source.update()
    assert float(source.subspace.eigenvalues[0]) == pytest.approx(expected, rel=0.05)


def test_the_source_of_a_users_own_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Source:
        report = subspace = None

        def update(self, *_: Any) -> Any:
            raise LookupError("my source")

        def split(self, vector: Tensor) -> Any: ...

        def state_dict(self) -> Any:
            raise NotImplementedError

        def load_state_dict(self, state: Any) -> None:
            raise NotImplementedError

    def arrange(model: Net, optimizer: Any) -> Watcher:
        objective = Objective(model, LOSS, data(), mode="eval")
        source: Any = Source()
        return Watcher(objective, source, optimizer, every=1, quiet=True)

    alone, _ = train(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)
        found, watcher = train(arrange)
    assert same(alone, found)
    assert watcher is not None
    assert failures(watcher) == dict.fromkeys(range(3), "LookupError: my source")


def test_a_failing_preconditioned_sharpness_leaves_the_rest_of_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def preconditioned_sharpness(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(watcher_module, "preconditioned_sharpness", preconditioned_sharpness)
    watcher = watched_like_unwatched(steps=2)
    assert len(watcher.history) == 2
    for row in watcher.history:
        assert row["failure"].startswith("no preconditioned sharpness: OutOfMemoryError")
        assert row["sharpness"] > 0
        assert row["stability_threshold"] > 0


def test_parameters_that_are_replaced_are_said_to_be() -> None:
    def before(model: Net, optimizer: Any, step: int) -> None:
        if step == 2:
            model.last.weight = nn.Parameter(model.last.weight.detach().clone())

    watcher = watched_like_unwatched(before)
    assert list(failures(watcher)) == [2, 3, 4]
    assert "parameter 2 of theta, (3, 5), is another object" in failures(watcher)[2]


def test_replaced_parameters_that_the_optimizer_got_are_followed() -> None:
    def before(model: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 2:
            model.last.weight = nn.Parameter(model.last.weight.detach().clone())
            optimizer.add_param_group({"params": [model.last.weight]})

    watcher = watched_like_unwatched(before)
    assert failures(watcher) == {}
    assert all(math.isfinite(row["alignment_minibatch"]) for row in watcher.history)


def test_a_layer_of_another_shape_is_a_failure() -> None:
    def before(model: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 2:
            model.first, model.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
            model.last = nn.Linear(6, 3)
            optimizer.add_param_group({"params": list(model.parameters())})

    watcher = watched_like_unwatched(before, kind=torch.optim.SGD)
    assert list(failures(watcher)) == [2, 3, 4]


def test_a_model_of_another_dtype_is_followed_or_said_to_be() -> None:
    def before(model: Net, optimizer: Any, step: int) -> None:
        if step == 2:
            model.double()

    def cast(output: Tensor, target: Tensor) -> Tensor:
        return LOSS(output, target)

    # Watched data of the first dtype: a failure that names it.
    watcher = watched_like_unwatched(before, kind=torch.optim.SGD)
    assert list(failures(watcher)) == [2, 3, 4]
    assert "dtype" in failures(watcher)[2]

    class Follows(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.last.weight.dtype))

    with seeded():
        model = Follows()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = observe(model, optimizer)
        inputs, target = data()
        for step in range(4):
            before(model, optimizer, step)
            optimizer.zero_grad()
            cast(model(inputs), target).backward()
            optimizer.step()
    assert failures(watcher) == {}
    assert watcher.source.subspace.basis.dtype == torch.float64


def test_a_group_that_is_added_is_not_watched_and_not_reported_as_if() -> None:
    def before(model: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 2:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 50.0})

    watcher = watched_like_unwatched(before)
    assert failures(watcher) == {}
    assert [row["learning_rate"] for row in watcher.history] == [0.05] * 6
    assert watcher.history[-1]["lr_sharpness"] == pytest.approx(
        0.05 * watcher.history[-1]["sharpness"]
    )


def test_an_optimizer_without_a_rate_has_none_in_its_row() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters: Any, lr: Any = None) -> None:
            super().__init__(parameters, {"lr": None})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.05 * parameter.grad)

    watcher = watched_like_unwatched(kind=Rateless)
    assert failures(watcher) == {}
    assert all(math.isnan(row["learning_rate"]) for row in watcher.history)


def test_nan_losses_are_rows_and_the_training_is_the_users() -> None:
    def before(model: Net, _: Any, step: int) -> None:
        if step == 2:
            nn.init.constant_(model.last.bias, math.inf)

    alone, _ = train(lambda *_: None, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)
        found, watcher = train(observe, before)
    assert watcher is not None
    assert failures(watcher) == dict.fromkeys((2, 3, 4), "the loss is NaN or infinite")
    assert same(alone["torch"], found["torch"])
    assert same(alone["python"], found["python"])


def test_data_that_changes_in_place_is_seen_and_cleared_data_is_a_failure() -> None:
    with seeded():
        model = Net().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        held = data()
        watcher = watch(model, LOSS, held, optimizer, every=1, k=2, quiet=True)
        inputs, target = data()

        def step() -> None:
            optimizer.zero_grad()
            LOSS(model(inputs), target).backward()
            optimizer.step()

        step()
        before = watcher.history[0]["loss"]
        held[0].mul_(3)
        step()
        assert watcher.history[1]["loss"] != before
        held[0].fill_(math.nan)
        with pytest.warns(WatchWarning, match="step 2: the loss is NaN"):
            step()


def test_a_file_that_was_closed_or_a_sink_that_closes_the_watcher() -> None:
    closed: list[Watcher] = []

    def sink(row: Any, step: int) -> None:
        if step == 2:
            closed[0].close()

    alone, _ = train(lambda *_: None)

    def both(model: Net, optimizer: Any) -> Watcher:
        closed.append(observe(model, optimizer))
        closed.append(observe(model, optimizer, sinks=[sink]))
        return closed[1]

    found, watcher = train(both)
    assert same(alone, found)
    assert watcher is not None
    assert [row["step"] for row in closed[0].history] == [0, 1, 2]
    assert [row["step"] for row in watcher.history] == list(range(6))
    closed[0].close()
    watcher.close()
    assert not watcher.optimizer._optimizer_step_pre_hooks
    assert not watcher.optimizer._optimizer_step_post_hooks


def test_a_watcher_that_nobody_holds_goes_on_and_is_freed_with_its_optimizer(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.csv"

    def arrange(model: Net, optimizer: Any) -> None:
        observe(model, optimizer, file=path)

    alone, _ = train(lambda *_: None)
    found, _ = train(arrange)
    assert same(alone, found)
    assert len(path.read_text().splitlines()) == 1 + 6


def test_a_closure_keeps_its_arguments_and_other_arguments_are_left_alone() -> None:
    seen: list[Any] = []

    class Fussy(torch.optim.SGD):
        def step(self, closure: Any = None, other: Any = None) -> Any:  # type: ignore[override]
            seen.append(closure)
            if callable(closure) and not isinstance(closure, nn.Module):
                return closure(backward=False)
            return None

    model = Net()
    optimizer = Fussy(model.parameters(), lr=0.1)
    observe(model, optimizer)
    given: list[Any] = []

    def closure(backward: bool = True) -> Tensor:
        given.append(backward)
        return torch.ones(())

    assert optimizer.step(closure) == 1
    assert given == [False]
    for other in (torch.ones(2), model, 3, None):
        optimizer.step(other)
        assert seen[-1] is other
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda **_: 1 / 0)


def test_a_gradient_that_cannot_be_read_counts_as_none() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    watcher = watch(model, LOSS, data(), optimizer, every=1, k=2, quiet=True)

    class Unreadable:
        def detach(self) -> Any:
            raise RuntimeError

    watcher._parameters = [type("P", (), {"grad": Unreadable()})()]  # type: ignore[list-item]
    state: Any = type("S", (), {"minibatch_gradient": None})()
    watcher._note_minibatch_gradient(state)
    assert state.minibatch_gradient is None


def test_history_belongs_to_the_user() -> None:
    def before(model: Net, _: Any, step: int) -> None:
        if step == 3:
            history = found[0].history
            history[0].clear()
            del history[1]

    found: list[Watcher] = []

    def arrange(model: Net, optimizer: Any) -> Watcher:
        found.append(observe(model, optimizer))
        return found[0]

    _, reference = train(observe)
    _, watcher = train(arrange, before)
    assert watcher is not None
    assert reference is not None
    key = "effective_lr_bulk"
    assert watcher.history[-1][key] == reference.history[-1][key]


def test_the_failure_is_in_the_file_in_the_parquet_and_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path, table = tmp_path / "rows.csv", tmp_path / "rows.parquet"
    for broken in (0, 99):

        def before(model: Net, _: Any, step: int, broken: int = broken) -> None:
            model.broken = raises(Unlike("a, b\n c")) if step == broken else None

        def arrange(model: Net, optimizer: Any) -> Watcher:
            sinks = ["console", f"parquet:{table}"]
            return observe(model, optimizer, file=path, sinks=sinks)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, watcher = train(arrange, before, 3)
        assert watcher is not None
        watcher.close()
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS
        expected = "Unlike: a, b c" if broken == 0 else ""
        assert [row["failure"] for row in rows] == [expected, "", ""]
        read = parquet.read_table(table)
        assert str(read.schema.field("failure").type) == "string"
        assert read.column("failure").to_pylist() == [expected or None, None, None]
        assert read.column_names[-1] == "failure"
        lines = capsys.readouterr().err.splitlines()
        if broken == 0:
            # The failed row does not decide which columns the others have.
            assert lines[0].split(maxsplit=1) == ["0", "Unlike: a, b c"]
        assert "sharpness" in "".join(lines)
        path.unlink()
        table.unlink()


def test_a_file_from_before_the_column_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("step,loss\n0,1.5\n1,1.25\n2,1.0\n")
    sink = CSV(path, ("step", "loss", "failure"), resume_at=2)
    sink.log({"loss": None, "failure": "lost"}, 2)
    assert path.read_text() == "step,loss,failure\n0,1.5,\n1,1.25,\n2,,lost\n"


def test_reasons_are_short_and_on_one_line() -> None:
    assert reason_of(InvalidInput("k: got 0")) == "k: got 0"
    assert reason_of(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert reason_of(MemoryError()) == "MemoryError"
    assert len(reason_of(RuntimeError("x" * 10_000))) < 400


def bad(**options: Any) -> Callable[[], Any]:
    def call() -> Any:
        model = options.pop("model", None) or nn.Linear(4, 3)
        parameters = model.parameters() if isinstance(model, nn.Module) else [torch.zeros(1)]
        given = {"loss": LOSS, "data": data()}
        given["optimizer"] = torch.optim.SGD(parameters, lr=0.1)
        return watch(**({"model": model, "quiet": True} | given | options))

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(every="10"), "every: got '10', allowed: an integer"),
        (bad(every=2.5), "every: got 2.5"),
        (bad(k=2.0), "k: got 2.0"),
        (bad(samples=True), "samples: got True"),
        (bad(seed="a"), "seed: got 'a'"),
        (bad(resume_at=1.5), "resume_at: got 1.5"),
        (bad(seed=2**80), "seed: got .*, allowed: an integer below"),
        (bad(budget="5%"), "budget: got '5%', allowed: a number > 0"),
        (bad(budget=-1), "budget: got -1, allowed"),
        (bad(threshold="0.1"), "threshold: got '0.1', allowed: a number"),
        (bad(error="1%"), "error: got '1%', allowed: a number"),
        (bad(chunk_size="big"), "chunk_size: got 'big', allowed: an integer"),
        (bad(probes="trace"), r"probes: got 'trace', allowed: a list of probes; .*\["),
        (bad(probes=None), "probes: got None, allowed: a list of probes"),
        (bad(file=3), "file: got 3, allowed: a path"),
        (bad(model="net"), "model: got 'str', allowed: an nn.Module"),
        (bad(loss=nn.MSELoss), r"loss: got 'MSELoss', allowed: .*; MSELoss\(\)"),
        (bad(loss="mse"), "loss: got 'mse'"),
        (bad(sinks="csv:rows.csv"), r"sinks: got 'csv:rows.csv', allowed: a list of sinks"),
        (bad(sinks=print), "sinks: got .*, allowed: a list of sinks"),
        (bad(file="/"), "file: got '/', allowed: the path of a file; this is a folder"),
        (bad(data=(torch.randn(24, 5), data()[1])), "first samples cannot be evaluated: .*Runtime"),
        (bad(loss=lambda o, t: o.nothing), "cannot be evaluated: .*AttributeError.*nothing"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_told_at_once(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def attached(*given: Any) -> Watcher | str:
    """The watcher, or the message of the refusal."""
    try:
        return watch(*given, k=2, every=1, quiet=True)
    except InvalidInput as error:
        return str(error)


@pytest.mark.parametrize(
    ("layer", "words"),
    [(nn.Hardsigmoid(), "hardsigmoid"), (nn.Hardswish(), "hardswish")],
)
def test_a_layer_without_second_derivative_is_refused_or_watched(
    layer: nn.Module, words: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = attached(model, LOSS, data(), optimizer)
    assert isinstance(watcher, Watcher) or words in watcher.lower()
    LOSS(model(data()[0]), data()[1]).backward()
    optimizer.step()


def test_without_a_watch_that_looked_first_it_is_a_failed_report() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        objective = Objective(model, LOSS, data())
        source = SubspaceTracker(objective, 2)
    except InvalidInput:
        return
    watcher = Watcher(objective, source, optimizer, every=1, quiet=True)
    twin = copy.deepcopy(model)
    LOSS(model(data()[0]), data()[1]).backward()
    with pytest.warns(WatchWarning, match="hardsigmoid"):
        optimizer.step()
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    LOSS(twin(data()[0]), data()[1]).backward()
    other.step()
    assert same(model.state_dict(), twin.state_dict())
    assert "hardsigmoid" in watcher.history[0]["failure"]


def test_the_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3))
    refusal = attached(model, LOSS, data(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(refusal, str)
    assert "layer '1' (Hardsigmoid)" in refusal


class Distances(nn.Module):
    """By torch.cdist, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centers)


class WrittenOut(Distances):
    """The same of operations that have one."""

    def forward(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(-2) - self.centers).norm(dim=-1)


def test_a_model_without_second_derivative_is_watched_by_differences() -> None:
    rows = []
    for kind in (Distances, WrittenOut):
        torch.manual_seed(0)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watcher = watch(model, LOSS, data(), optimizer, k=2, every=1, quiet=True)
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model(data()[0]), data()[1]).backward()
            optimizer.step()
        rows.append(watcher.history)
    for row, exact in zip(*rows, strict=True):
        assert row["sharpness"] == pytest.approx(exact["sharpness"], rel=1e-3)
        assert row["alignment_gradient"] == pytest.approx(exact["alignment_gradient"], abs=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_step_is_the_same_and_is_reported() -> None:
    def train_compiled(watched: bool) -> tuple[Any, list[dict[str, Any]]]:
        with seeded():
            torch._dynamo.reset()
            model = Net().eval()
            optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
            watcher = observe(model, optimizer, every=2) if watched else None
            step = torch.compile(optimizer.step, backend="eager")
            for _ in range(3):
                optimizer.zero_grad()
                LOSS(model(data()[0]), data()[1]).backward()
                step()
        return model.state_dict(), watcher.history if watcher else []

    alone, _ = train_compiled(False)
    found, history = train_compiled(True)
    assert same(alone, found)
    assert [(row["step"], row["failure"]) for row in history] == [(0, None), (2, None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision_are_refused_at_once_or_right(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, target = data()
    model = nn.Linear(4, 3).to(dtype)
    double = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = inputs.to(dtype), target
    watcher = attached(model, LOSS, given, optimizer)
    if isinstance(watcher, str):
        assert str(dtype).removeprefix("torch.") in watcher
        return
    LOSS(model(given[0]), target).backward()
    optimizer.step()
    exact = Objective(double, LOSS, (given[0].double(), target))
    expected = float(SubspaceTracker(exact, 2, exact=True).update().eigenvalues[0])
    assert watcher.history[0]["sharpness"] == pytest.approx(expected, rel=0.05)


def test_sparse_gradients_are_refused_at_once_or_right() -> None:
    torch.manual_seed(0)
    ids, target = torch.arange(6), torch.arange(6) % 3
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3))
    dense = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    dense.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = attached(model, LOSS, (ids, target), optimizer)
    if isinstance(watcher, str):
        assert "layer '0' (Embedding) has sparse gradients" in watcher
        return
    LOSS(model(ids), target).backward()
    optimizer.step()
    objective = Objective(dense, LOSS, (ids, target))
    expected = float(SubspaceTracker(objective, 2, exact=True).update().eigenvalues[0])
    assert watcher.history[0]["sharpness"] == pytest.approx(expected, rel=0.02)
    assert watcher.history[0]["alignment_minibatch"] is not None


class Group(Reduction):
    """This process and others; what they say at each sum is given."""

    def __init__(self, others: Callable[[int], float] = lambda _: 0.0) -> None:
        self.others = others
        self.said: list[float] = []
        self.closed = 0

    def sum(self, partial: Tensor) -> Tensor:
        self.closed += 1
        return partial

    def total(self, partial: float) -> float:
        self.said.append(partial)
        return partial + self.others(len(self.said))


def grouped(others: Callable[[int], float]) -> tuple[Group, Net, Any, Watcher]:
    torch.manual_seed(0)
    model, group = Net().eval(), Group(others)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # A mean over samples: no sum of weights is closed.
    options: Any = {"mode": "eval", "reduction": group, "check": False}
    objective = Objective(model, lambda *both: LOSS(*both), data(), **options)
    source = SubspaceTracker(objective, 2)
    watcher = Watcher(objective, source, optimizer, every=1, quiet=True)
    LOSS(model(data()[0]), data()[1]).backward()
    return group, model, optimizer, watcher


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_where_another_process_fails_this_one_skips_the_report(moment: int) -> None:
    group, _, optimizer, watcher = grouped(lambda count: float(count == moment))
    with pytest.warns(WatchWarning, match="step 0: another process has failed"):
        optimizer.step()
    # It has heard of the failure at that moment and closed no other sum since.
    assert group.said == [0.0] * moment
    assert watcher.history[0]["failure"] == "another process has failed"
    optimizer.step()
    assert watcher.history[1]["failure"] is None
    assert watcher.objective.reduction is group  # type: ignore[attr-defined]


def test_a_process_that_fails_says_so_once_and_the_number_of_its_calls_is_that_of_others() -> None:
    group, model, optimizer, watcher = grouped(lambda _: 0.0)
    model.broken = raises(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.warns(WatchWarning, match="OutOfMemoryError"):
        optimizer.step()
    # Before it looked at theta, before it evaluated its samples, and once it had failed.
    assert group.said == [0.0, 0.0, 1.0]
    assert "OutOfMemoryError" in watcher.history[0]["failure"]


def test_in_a_group_that_fares_well_numbers_are_those_of_one_process() -> None:
    group, _, optimizer, watcher = grouped(lambda _: 0.0)
    optimizer.step()
    _, _, other, alone = grouped(lambda _: 0.0)
    alone.objective.reduction = Reduction()  # type: ignore[attr-defined]
    other.step()
    hidden = {"seconds"}
    for key in COLUMNS:
        if key not in hidden:
            assert watcher.history[0][key] == alone.history[0][key], key
    # A number goes ahead of each call of `sums` (that of value and gradient closes two) and of one
    # look at theta, and one behind the last of each of two parts.
    # In a third part ahead of two numbers, what report and training have cost, which are said too.
    assert len(group.said) == group.closed - 1 + 1 + 2 + 5
    assert sum(number != 0.0 for number in group.said) <= 2


def test_all_or_none_leaves_interrupts_and_losses_without_reduction_alone() -> None:
    loss: Any = type("Loss", (), {})()
    with all_or_none(loss):
        pass
    loss.reduction = group = Group(lambda _: 0.0)
    with pytest.raises(KeyboardInterrupt), all_or_none(loss):
        raise KeyboardInterrupt
    assert group.said == []
    with pytest.raises(ValueError, match="own"), all_or_none(loss):
        raise ValueError("own")
    assert group.said == [1.0]
    loss.reduction = Group(lambda _: 2.0)
    with pytest.raises(ProcessFailed), all_or_none(loss):
        pass
