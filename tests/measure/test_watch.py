from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.optim.wrapping_of_others import Delegating, Prepared
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.sinks import History, WatchWarning
from thalweg.measure.watch import watch
from thalweg.measure.watcher import COLUMNS, Watcher
from thalweg.operators.hessian import Hessian
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum import gap
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker
from thalweg.tracking.wrapping import needs_closure

LEARNING_RATE = 0.05


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


class Restless(Dataset):
    """Gives the same sample at every reading, but draws random numbers of all kinds for it."""

    def __init__(self, inputs: Tensor, target: Tensor) -> None:
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        _ = random.random(), np.random.random(), torch.rand(())
        return self.inputs[index], self.target[index]


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 1, 6, 6, generator=generator)
    return inputs, torch.randint(0, 3, (40,), generator=generator)


def train(
    make: Callable[[], nn.Module], observe: Callable[..., Watcher] | None, *, steps: int = 6
) -> dict[str, Any]:
    """Clipped Adam on batches drawn from all three generators; everything that training holds."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model, loss = make(), nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    parameters[-1].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, target = images()
    watcher = None if observe is None else observe(model, loss, Restless(inputs, target), optimizer)
    for _ in range(steps):
        noise = random.random() + np.random.random()
        chosen = torch.randint(0, len(inputs), (8,))
        optimizer.zero_grad()
        loss(model(inputs[chosen] + 0.1 * noise), target[chosen]).backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    if watcher is not None:
        assert len(watcher.history) == math.ceil(steps / watcher.every)
        assert all(math.isfinite(row["sharpness"]) for row in watcher.history)
        watcher.close()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "gradients": [p.grad for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, (Tensor, np.ndarray)):
        return bool((first == second).all()) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("make", few(1, [mlp, cnn]))
def test_training_is_bit_for_bit_what_it_was_without(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The gap of these small problems is closed here and there: of no matter. Not by a filter of
    # warnings: those belong to the whole process, and whatever restores older ones undoes it.
    monkeypatch.setattr(gap, "CLOSED", math.inf)
    alone = train(make, None)
    for options in ({"every": 3}, {"every": 2, "exact": True}, {"every": 4, "samples": 16}):
        watched = train(make, lambda *a, o=options: watch(*a, quiet=True, **o))  # type: ignore[misc]
        for part, value in alone.items():
            assert same(value, watched[part]), part
    # The comparison would notice.
    assert not same(alone["model"], train(make, None, steps=9)["model"])


class Regression:
    """Full-batch training on least squares: the Hessian is one matrix everywhere; float64."""

    def __init__(
        self, kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any
    ) -> None:
        torch.manual_seed(0)
        scales = torch.tensor([5, 3, 1, 1, 0.5, 0.2], dtype=torch.float64)
        self.inputs = torch.randn(60, 6, dtype=torch.float64) * scales
        self.target = torch.randn(60, 1, dtype=torch.float64)
        self.model = nn.Linear(6, 1).double()
        self.loss = nn.MSELoss()
        self.optimizer = kind(self.model.parameters(), **{"lr": LEARNING_RATE} | options)

    def watch(self, **options: Any) -> Watcher:
        options = {"k": 2, "exact": True, "quiet": True, "every": 2} | options
        data = (self.inputs, self.target)
        return watch(self.model, self.loss, data, self.optimizer, **options)

    def objective(self) -> Objective:
        return Objective(self.model, self.loss, (self.inputs, self.target))

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        value = self.loss(self.model(self.inputs), self.target)
        value.backward()
        return value

    def step(self) -> float:
        value = self.backward()
        self.optimizer.step()
        return float(value.detach())

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters()])  # type: ignore[union-attr]

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones(60, 1, dtype=torch.float64)
        extended = torch.cat([self.inputs, ones], 1)
        values, vectors = torch.linalg.eigh(2 * extended.T @ extended / 60)
        return values.flip(0), vectors.flip(1)


def test_a_report_says_what_holds_before_its_step() -> None:
    problem = Regression()
    watcher = problem.watch()
    values, vectors = problem.eigenpairs()
    for step in range(5):
        loss = problem.step()
        if step % 2:
            continue
        row = watcher.history[-1]
        gradient = problem.gradient()
        chi = float((vectors[:, :2].T @ gradient).norm() / gradient.norm())
        assert tuple(row) == COLUMNS
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss)
        assert row["sharpness"] == pytest.approx(float(values[0]), rel=1e-5)
        assert row["lr_sharpness"] == pytest.approx(LEARNING_RATE * float(values[0]), rel=1e-5)
        assert row["stability_threshold"] == pytest.approx(2 / LEARNING_RATE)
        for vector in ("gradient", "minibatch", "update"):
            assert row[f"alignment_{vector}"] == pytest.approx(chi, rel=1e-3)
        for part in ("dominant", "bulk"):
            assert row[f"effective_lr_{part}"] == pytest.approx(LEARNING_RATE, rel=1e-3)
        assert row["subspace_gradients"] > 1
        assert row["seconds"] > 0
    assert [row["step"] for row in watcher.history] == [0, 2, 4]


def test_alignments_are_those_of_three_vectors() -> None:
    problem = Regression(torch.optim.SGD, momentum=0.9)
    watcher = problem.watch(every=1)
    _, vectors = problem.eigenpairs()
    problem.step()
    # The second step: another mini-batch gradient than the full one, and an update with a past.
    full = (problem.backward(), problem.gradient())[1]
    start = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])
    given = torch.randn(7, dtype=torch.float64)
    for parameter, part in zip(problem.model.parameters(), given.split([6, 1]), strict=True):
        parameter.grad = part.reshape(parameter.shape)
    problem.optimizer.step()
    made = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()]) - start
    expected = {"gradient": full, "minibatch": given, "update": made}
    for name, vector in expected.items():
        chi = float((vectors[:, :2].T @ vector).norm() / vector.norm())
        assert watcher.history[-1][f"alignment_{name}"] == pytest.approx(chi, rel=1e-3)


def test_effective_learning_rates_are_ratios_of_sums_over_the_last_ten_reports() -> None:
    problem = Regression(torch.optim.SGD, momentum=0.5)
    watcher = problem.watch(every=1)
    for _ in range(13):
        problem.step()
    last = watcher.history[-10:]
    for part in ("dominant", "bulk"):
        sums = [sum(row[f"lr_{n}_{part}"] for row in last) for n in ("numerator", "denominator")]
        assert watcher.history[-1][f"effective_lr_{part}"] == pytest.approx(sums[0] / sums[1])
    assert watcher.history[-1]["effective_lr_bulk"] > 1.2 * LEARNING_RATE


def test_steps_that_are_not_due_cost_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Regression()
    calls: list[str] = []
    for name in ("theta", "value", "value_and_gradient", "evaluations"):
        original = getattr(Objective, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            calls.append(_name)
            return _original(*args, **more)

        monkeypatch.setattr(Objective, name, counted)
    problem.watch(every=100)
    calls.clear()
    problem.step()
    assert calls.count("value_and_gradient") == 1
    calls.clear()
    for _ in range(99):
        problem.step()
    assert calls == []
    problem.step()
    assert calls.count("theta") == 2


def test_closing_takes_the_hooks_away() -> None:
    problem = Regression()
    with problem.watch() as watcher:
        problem.step()
    watcher.close()
    assert not problem.optimizer._optimizer_step_pre_hooks
    assert not problem.optimizer._optimizer_step_post_hooks
    problem.step()
    problem.step()
    assert len(watcher.history) == 1
    assert repr(watcher) == "Watcher(closed, every=2, step=1, reports=1)"


def test_after_an_exception_in_the_training_all_reports_are_in_the_file(tmp_path: Path) -> None:
    problem, path = Regression(), tmp_path / "rows.csv"

    def training() -> None:
        with problem.watch(file=path):
            for step in range(9):
                problem.step()
                _ = 1 / (4 - step)

    with pytest.raises(ZeroDivisionError):
        training()
    assert not problem.optimizer._optimizer_step_pre_hooks
    assert len(path.read_text().splitlines()) == 1 + 3


def test_a_step_that_raises_is_not_counted() -> None:
    problem = Regression()
    watcher = problem.watch(every=1)

    def broken() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        problem.optimizer.step(broken)  # type: ignore[arg-type]
    assert (watcher.step, watcher.history) == (0, [])
    problem.step()
    assert [row["step"] for row in watcher.history] == [0]


def test_the_file_holds_the_history(tmp_path: Path) -> None:
    problem, path = Regression(), tmp_path / "rows.csv"
    watcher = problem.watch(file=path)
    for _ in range(5):
        problem.step()
    with path.open(newline="") as file:
        rows = [
            {k: v if k == "caveat" else json.loads(v or "0") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
    # Plain gradient descent has no metric of its own: the cell is empty.
    empty = {"preconditioned_sharpness": 0.0, "failure": 0.0}
    expected = [{**row, **empty, "caveat": row["caveat"] or ""} for row in watcher.history]
    assert rows == expected
    with pytest.raises(InvalidInput, match="not there yet; pass overwrite=True, or resume_at"):
        problem.watch(file=path)
    # Neither the file nor the optimizer was touched by that.
    assert len(problem.optimizer._optimizer_step_pre_hooks) == 1
    assert len(path.read_text().splitlines()) == 4


def test_a_resumed_training_goes_on_with_steps_and_file(tmp_path: Path) -> None:
    problem, path = Regression(), tmp_path / "rows.csv"
    with problem.watch(file=path):
        for _ in range(5):
            problem.step()
    watcher = problem.watch(file=path, resume_at=3)
    for _ in range(4):
        problem.step()
    assert [row["step"] for row in watcher.history] == [4, 6]
    with path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "4", "6"]


@pytest.mark.parametrize("by_name", [False, True])
def test_the_gradient_of_a_closure_is_that_of_its_first_call(by_name: bool) -> None:
    problem = Regression(torch.optim.LBFGS, max_iter=4)
    watcher = problem.watch(every=1)
    _, vectors = problem.eigenpairs()
    problem.backward()
    gradient = problem.gradient()
    problem.optimizer.zero_grad()
    calls: list[float] = []

    def closure() -> Tensor:
        value = problem.backward()
        calls.append(float(value.detach()))
        return value

    step: Any = problem.optimizer.step
    returned = step(closure=closure) if by_name else step(closure)
    assert float(returned.detach()) == calls[0]
    assert len(calls) > 1
    chi = float((vectors[:, :2].T @ gradient).norm() / gradient.norm())
    row = watcher.history[0]
    assert row["alignment_minibatch"] == pytest.approx(chi, rel=1e-3)
    assert row["alignment_update"] != pytest.approx(row["alignment_minibatch"], rel=1e-3)
    assert row["stability_threshold"] is None


def test_steps_that_a_gradient_scaler_skips_are_not_counted() -> None:
    problem = Regression()
    watcher = problem.watch(every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss(problem.model(problem.inputs), problem.target)).backward()
        if step == 1:
            problem.model.weight.grad[0, 0] = math.inf  # type: ignore[index]
        scaler.step(problem.optimizer)
        scaler.update()
    assert watcher.step == 3
    assert [row["step"] for row in watcher.history] == [0, 1, 2]
    for row in watcher.history:
        assert row["effective_lr_bulk"] == pytest.approx(LEARNING_RATE, rel=1e-3)


def test_several_watchers_of_one_optimizer_do_not_meet() -> None:
    problem = Regression()
    first, second = problem.watch(every=2), problem.watch(every=3)
    for _ in range(7):
        problem.step()
    assert [row["step"] for row in first.history] == [0, 2, 4, 6]
    assert [row["step"] for row in second.history] == [0, 3, 6]
    for key in COLUMNS[:10]:
        one, other = first.history[-1][key], second.history[-1][key]
        assert one == other if one is None else one == pytest.approx(other, rel=1e-3)
    first.close()
    problem.step()
    assert (first.step, second.step) == (7, 8)


def test_parameters_that_the_optimizer_does_not_update_are_no_part_of_theta() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(30, 4), torch.randint(0, 3, (30,))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    watcher = watch(model, nn.CrossEntropyLoss(), data, optimizer, quiet=True)
    assert watcher.objective.layout.names == ("2.weight", "2.bias")
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    part = watch(model, nn.CrossEntropyLoss(), data, both, parameters="0.*", quiet=True)
    assert part.objective.layout.names == ("0.weight", "0.bias")
    with pytest.raises(InvalidInput, match="updates none of these parameters"):
        watch(model, nn.CrossEntropyLoss(), data, optimizer, parameters="0.*", quiet=True)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="build both of one model"):
        watch(model, nn.CrossEntropyLoss(), data, other)


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    problem = Regression()
    watcher = problem.watch(every=1)
    problem.backward()
    problem.model.bias.grad = None
    problem.optimizer.step()
    assert 0 < watcher.history[0]["alignment_minibatch"] <= 1
    problem.optimizer.zero_grad()
    problem.optimizer.step()
    row = watcher.history[1]
    assert row["alignment_minibatch"] is None
    assert math.isnan(row["alignment_update"])


class Logits(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(input))


class DictOfLogits(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return {"logits": super().forward(input)}


def inferred(model: nn.Module, loss: Any, target: Tensor) -> int:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(len(target), 4), target
    return watch(model, loss, data, optimizer, quiet=True).source.k  # type: ignore[attr-defined]


def test_k_is_the_number_of_classes_where_the_output_tells() -> None:
    labels = torch.tensor([0, 1, 2, 0] * 4)
    cross_entropy = nn.CrossEntropyLoss()
    assert inferred(nn.Linear(4, 3), cross_entropy, labels) == 3
    assert inferred(nn.Linear(4, 3), nn.MSELoss(), torch.randn(16, 3)) == 3
    for kind in (Logits, DictOfLogits):

        def loss(output: Any, target: Tensor) -> Tensor:
            logits = output["logits"] if isinstance(output, dict) else output.logits
            return cross_entropy(logits, target)

        assert inferred(kind(4, 5), loss, labels) == 5


class ReturnsItsLoss(nn.Linear):
    """In the manner of Hugging Face: a dict batch in, an object with loss and logits out."""

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(inputs)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_a_model_that_returns_its_loss_is_watched_too() -> None:
    torch.manual_seed(0)
    model = ReturnsItsLoss(4, 3)
    batch = {"inputs": torch.randn(20, 4), "labels": torch.randint(0, 3, (20,))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with watch(model, None, batch, optimizer, quiet=True) as watcher:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert watcher.history[0]["loss"] == pytest.approx(float(loss.detach()))
    assert watcher.source.k == 3  # type: ignore[attr-defined]


def test_of_a_split_optimizer_the_update_made_is_watched() -> None:
    problem = Regression()
    source = SubspaceTracker(problem.objective(), 2, exact=True)
    problem.optimizer = SplitUpdate(problem.optimizer, source, dominant=0.0, bulk=1.0)
    watcher = problem.watch(every=1)
    for _ in range(3):
        problem.step()
    for row in watcher.history:
        assert row["alignment_gradient"] > 0.3
        assert row["alignment_update"] < 1e-2
        assert row["effective_lr_dominant"] == pytest.approx(0, abs=1e-3)
        assert row["effective_lr_bulk"] == pytest.approx(LEARNING_RATE, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (nn.Linear(4, 1), torch.randn(16, 1)),
        (nn.Linear(4, 101), torch.randn(16, 101)),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))), torch.randn(16, 2, 3)),
    ],
)
def test_where_it_does_not_tell_k_is_asked_for(model: nn.Module, target: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"k: got None, .*from 1 to P = \d+; .*give k"):
        inferred(model, nn.MSELoss(), target)


def test_a_number_of_samples_bounds_what_is_watched() -> None:
    problem = Regression()
    watcher = problem.watch(samples=20, seed=1)
    assert watcher.objective.num_samples == 20
    again, other = problem.watch(samples=20, seed=1), problem.watch(samples=20, seed=2)
    value = float(watcher.objective.value())
    assert float(again.objective.value()) == value
    assert float(other.objective.value()) != value
    for wrong in (0, 61):
        with pytest.raises(InvalidInput, match=r"samples: got \d+, allowed: .*1 to N = 60"):
            problem.watch(samples=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: got 0"),
        ({"k": 0}, "k: got 0"),
        ({"k": 8}, "from 1 to P = 7"),
        ({"resume_at": -1}, "resume_at: got -1"),
        ({"error": 0.0, "exact": False}, "error: got 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    problem = Regression()
    with pytest.raises(InvalidInput, match=message):
        problem.watch(**options)
    assert not problem.optimizer._optimizer_step_pre_hooks


def test_a_loss_that_is_wrong_from_the_start_is_told_at_once() -> None:
    problem = Regression()
    problem.loss = lambda output, target: (output - target).square()  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match="a scalar tensor"):
        problem.watch()
    problem = Regression()
    nn.init.constant_(problem.model.weight, math.nan)
    with pytest.raises(Diverged):
        problem.watch()


def test_a_loss_that_diverges_does_not_stop_the_training(tmp_path: Path) -> None:
    problem, path = Regression(), tmp_path / "rows.csv"
    watcher = problem.watch(every=1, file=path, exact=False)
    problem.step()
    before = problem.model.weight.detach().clone()
    nn.init.constant_(problem.model.weight, math.nan)
    problem.backward()
    with pytest.warns(WatchWarning, match="step 1: the loss is NaN or infinite; this report is"):
        problem.optimizer.step()
    problem.model.weight.data = before
    problem.model.bias.data.zero_()
    problem.step()
    assert [row["step"] for row in watcher.history] == [0, 1, 2]
    assert [row["loss"] is None for row in watcher.history] == [False, True, False]
    assert math.isfinite(watcher.history[2]["effective_lr_bulk"])
    assert path.read_text().splitlines()[2].startswith("1,0.05,,")


def test_a_file_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    problem = Regression()
    watcher = problem.watch(every=1, file=folder / "rows.csv")
    (folder / "rows.csv").unlink()
    folder.rmdir()
    with pytest.warns(WatchWarning, match="step 0 could not be written"):
        problem.step()
    assert len(watcher.history) == 1


def test_every_sink_gets_the_rows_of_the_history_and_is_closed(tmp_path: Path) -> None:
    problem, rows, path = Regression(), [], tmp_path / "rows.csv"
    own = History()
    closed: list[str] = []
    own.close = lambda: closed.append("own")  # type: ignore[method-assign]
    sinks = [own, lambda row, step: rows.append((step, row)), f"csv:{path}"]
    with problem.watch(sinks=sinks) as watcher:
        for _ in range(5):
            problem.step()
    assert own.rows == watcher.history
    assert rows == [(row["step"], row) for row in watcher.history]
    assert len(path.read_text().splitlines()) == 1 + 3
    assert closed == ["own"]


def test_a_sink_that_fails_or_draws_leaves_no_trace_in_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gap, "CLOSED", math.inf)
    alone = train(mlp, None)

    def sink(row: dict[str, Any], step: int) -> None:
        torch.manual_seed(step)
        _ = random.random(), np.random.random()
        row.clear()
        raise RuntimeError

    def observe(*given: Any) -> Watcher:
        return watch(*given, quiet=True, every=2, sinks=[sink])

    with pytest.warns(WatchWarning, match="step 0 could not be written") as caught:
        watched = train(mlp, observe)
    assert len(caught) == 1
    for part, value in alone.items():
        assert same(value, watched[part]), part


def test_a_console_that_was_asked_for_is_not_doubled(capsys: pytest.CaptureFixture) -> None:
    problem = Regression()
    problem.watch(quiet=False, sinks=["console"])
    problem.step()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_console_gets_a_heading_and_a_line_a_report(capsys: pytest.CaptureFixture) -> None:
    problem = Regression()
    problem.watch(quiet=False)
    for _ in range(3):
        problem.step()
    out, err = capsys.readouterr()
    heading, *lines = err.splitlines()
    assert out == ""
    assert heading.split()[:3] == ["step", "loss", "sharpness"]
    assert [line.split()[0] for line in lines] == ["0", "2"]
    assert {len(line) for line in lines} == {len(heading)}
    problem.watch()
    problem.step()
    problem.step()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_under_adam_the_preconditioned_sharpness_is_that_of_the_step(
    capsys: pytest.CaptureFixture,
) -> None:
    problem = Regression(torch.optim.Adam)
    watcher = problem.watch(quiet=False, every=1)
    matrix = Hessian(problem.objective()) @ torch.eye(7, dtype=torch.float64)
    for _ in range(4):
        problem.step()
        diagonal = preconditioner(problem.optimizer)
        expected = float(torch.linalg.eigvals(matrix / diagonal[:, None]).real.max())
        row = watcher.history[-1]
        assert row["preconditioned_sharpness"] == pytest.approx(expected, rel=1e-2)
        assert row["stability_threshold"] == pytest.approx(38 / LEARNING_RATE)
    assert "in metric" in capsys.readouterr().err


def test_the_metric_of_adam_is_found_inside_of_a_split() -> None:
    problem = Regression(torch.optim.Adam)
    source = SubspaceTracker(problem.objective(), 2, exact=True)
    adam = problem.optimizer
    problem.optimizer = SplitUpdate(adam, source, dominant=0.0, bulk=1.0)
    watcher = problem.watch(every=1)
    problem.step()
    matrix = Hessian(problem.objective()) @ torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.eigvals(matrix / preconditioner(adam)[:, None]).real.max()
    found = watcher.history[0]["preconditioned_sharpness"]
    assert found == pytest.approx(float(expected), rel=1e-2)


def test_a_parameter_that_adam_never_moved_leaves_the_preconditioned_sharpness_out() -> None:
    problem = Regression(torch.optim.Adam)
    watcher = problem.watch()
    problem.backward()
    problem.model.bias.grad = None
    with pytest.warns(WatchWarning, match="no preconditioned sharpness: parameter 1, "):
        problem.optimizer.step()
    assert watcher.history[0]["preconditioned_sharpness"] is None


def test_a_missing_threshold_is_explained(capsys: pytest.CaptureFixture) -> None:
    Regression(torch.optim.Adadelta).watch(quiet=False)
    assert "Adadelta has no stability threshold" in capsys.readouterr().err


def test_a_compiled_model_is_watched_through_the_one_it_was_made_from() -> None:
    problem = Regression()
    own = problem.model
    problem.model = torch.compile(own, backend="eager")  # type: ignore[assignment]
    assert problem.model is not own
    assert problem.watch().objective.model is own


def classifier() -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), (torch.randn(24, 4).double(), torch.randint(0, 3, (24,)))


def one_step(model: nn.Module, data: tuple[Tensor, Tensor], optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss.detach()

    if needs_closure(optimizer):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def watched_step(watched: Any, stepped: Any, model: nn.Module, data: Any) -> dict[str, Any]:
    loss = nn.CrossEntropyLoss()
    with watch(model, loss, data, watched, every=1, k=2, exact=True, quiet=True) as watcher:
        one_step(model, data, stepped)
        one_step(model, data, stepped)
    assert [row["step"] for row in watcher.history] == [0, 1]
    return watcher.history[0]


@pytest.mark.parametrize("watched", ["base", "wrapper", "prepared", "delegating"])
@pytest.mark.parametrize("built", few(1, ["before", "after"]))
def test_whichever_is_given_the_update_that_is_made_is_reported(watched: str, built: str) -> None:
    model, data = classifier()
    loss = nn.CrossEntropyLoss()
    base = torch.optim.SGD(model.parameters(), lr=0.1)

    def wrapped() -> SplitUpdate:
        source = SubspaceTracker(Objective(model, loss, data), 2, exact=True, tolerance=1e-8)
        return SplitUpdate(base, source, dominant=0.0)

    split = wrapped() if built == "before" else None
    given: Any = {
        "base": base,
        "wrapper": split,
        "prepared": Prepared(split or base),
        "delegating": Delegating(split or base),
    }[watched]
    if given is None:
        return
    with watch(model, loss, data, given, every=1, k=2, exact=True, quiet=True) as watcher:
        split = split or wrapped()
        for _ in range(2):
            one_step(model, data, split)
    assert [row["step"] for row in watcher.history] == [0, 1]
    for row in watcher.history:
        assert row["effective_lr_dominant"] == pytest.approx(0, abs=0.001)
        assert row["effective_lr_bulk"] == pytest.approx(0.1, rel=0.01)
    for optimizer in (base, split):
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_a_step_of_the_inner_one_alone_is_reported_too_also_after_one_that_failed() -> None:
    model, data = classifier()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    source = FixedSubspace(random_subspace(15, 2, 0, dtype=torch.float64))
    split = SplitUpdate(base, source, 0.0, parameters=list(model.parameters()))
    loss = nn.CrossEntropyLoss()
    with watch(model, loss, data, base, every=1, k=2, exact=True, quiet=True) as watcher:
        one_step(model, data, base)
        source.split = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
        with pytest.raises(ZeroDivisionError):
            one_step(model, data, split)
        # Its first step may still be that of a wrapper; the second can not.
        for _ in range(3):
            one_step(model, data, base)
    assert [row["step"] for row in watcher.history][:2] == [0, 1]
    rates = [row["effective_lr_bulk"] for row in watcher.history]
    assert rates == pytest.approx([0.1] * len(rates), rel=0.01)


@pytest.mark.parametrize("around", ["split", "sam", "prepared", "combined"])
def test_the_metric_of_adam_is_found_inside_of_every_wrapper(around: str) -> None:
    model, data = classifier()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    source = FixedSubspace(random_subspace(15, 2, 0, dtype=torch.float64))
    optimizer: Any = {
        "split": lambda: SplitUpdate(base, source, parameters=list(model.parameters())),
        "sam": lambda: SAM(base),
        "prepared": lambda: Prepared(SAM(base)),
        "combined": lambda: SplitUpdate(
            Combined(
                [
                    torch.optim.Adam([model.weight], lr=0.01),
                    torch.optim.AdamW([model.bias], lr=0.02),
                ]
            ),
            source,
            parameters=list(model.parameters()),
        ),
    }[around]()
    hessian = Hessian(Objective(model, nn.CrossEntropyLoss(), data)) @ torch.eye(15).double()
    loss = nn.CrossEntropyLoss()
    with watch(model, loss, data, optimizer, every=1, k=2, exact=True, quiet=True) as watcher:
        one_step(model, data, optimizer)
    row = watcher.history[0]
    root = preconditioner(base if around != "combined" else optimizer, model.parameters()).sqrt()
    if around == "combined":
        # The bias and the weight each with the second moment of its own optimizer, after a step.
        moments = [optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]
        assert torch.allclose(root**2, 0.1 * ((torch.cat(moments) / 0.001).sqrt() + 1e-8))
        assert row["stability_threshold"] == pytest.approx((2 - 0.02 * 0.01) * 1.9 / 0.1 / 0.02)
    dense = hessian / root / root.unsqueeze(1)
    expected = float(torch.linalg.eigvalsh(dense)[-1])
    assert row["preconditioned_sharpness"] == pytest.approx(expected, rel=1e-3)


def test_the_threshold_reported_for_sam_is_that_of_the_step() -> None:
    model, data = classifier()
    loss = nn.CrossEntropyLoss()
    size = float(Objective(model, loss, data).gradient().norm())
    row = watched_step(
        optimizer := SAM(torch.optim.SGD(model.parameters(), lr=0.1)), optimizer, model, data
    )
    # lambda at which lr lambda (1 + rho lambda / norm(g)) = 2.
    value = row["stability_threshold"]
    assert 0.1 * value * (1 + 0.05 * value / size) == pytest.approx(2)


def test_sam_by_hand_is_watched() -> None:
    model, data = classifier()
    loss = nn.CrossEntropyLoss()
    theta = Objective(model, loss, data).theta()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
    for given in (optimizer, optimizer.base_optimizer):
        with watch(model, loss, data, given, every=1, k=2, exact=True, quiet=True) as watcher:
            expected = float(loss(model(data[0]), data[1]).detach())
            optimizer.zero_grad()
            loss(model(data[0]), data[1]).backward()
            optimizer.first_step(zero_grad=True)
            loss(model(data[0]), data[1]).backward()
            optimizer.second_step()
        (row,) = watcher.history
        assert row["loss"] == pytest.approx(expected)
    assert not torch.equal(theta, Objective(model, loss, data).theta())


def test_what_is_no_optimizer_is_refused_by_name() -> None:
    model, data = classifier()
    with pytest.raises(
        InvalidInput, match=r"optimizer: got 'the class SGD', allowed: an optimizer"
    ):
        watch(model, nn.CrossEntropyLoss(), data, torch.optim.SGD)  # type: ignore[arg-type]
