from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.networks import Case, mlp
from tests.sampling import few
from thalweg import watch
from thalweg.errors import InvalidInput
from thalweg.loss.chunk_multiplier import ChunkMultiplier
from thalweg.measure.report_spacing import EVERY, ReportSpacing
from thalweg.measure.tier import QUICK_SHARE
from thalweg.measure.training_samples import TrainingSamples
from thalweg.measure.watcher import Watcher


@given(
    budget=st.floats(0.01, 1.0),
    rate=st.integers(1, 200),
    first=st.integers(1, 10_000),
    later=st.lists(st.integers(1, 3_000), min_size=1, max_size=8),
)
def test_all_reports_but_the_first_are_paid_for_when_they_are_made(
    budget: float, rate: int, first: int, later: list[int]
) -> None:
    spacing = ReportSpacing(None, budget)
    counted = step = spent = dearest = 0
    for cost in [first, *later]:
        assert not spacing.is_due(step - 1)
        assert spacing.is_due(step)
        assert spent + dearest <= budget * rate * step * (1 + 1e-9)
        spacing.note(step, cost, rate * (step + 1 - counted))
        counted, dearest, spent = step + 1, max(dearest, cost), spent + cost
        assert spacing.overhead == pytest.approx(spent / (rate * counted))
        step = spacing.next_step
        assert step % 10 == 0


def test_no_report_is_much_later_than_it_has_to_be() -> None:
    spacing = ReportSpacing(None, 0.1)
    spacing.note(0, 300.0, 6.0)
    # Twice 300 at a tenth of 6 a step.
    assert spacing.next_step == 1000
    spacing.note(1000, 30.0, 6000.0)
    assert spacing.next_step == 1050  # (330 + 300) / 0.6


def test_without_a_count_of_the_training_reports_are_fifty_steps_apart() -> None:
    spacing = ReportSpacing(None)
    for step in (0, EVERY, 2 * EVERY):
        assert spacing.is_due(step)
        spacing.note(step, 300.0, 0.0)
        assert not spacing.is_due(step + EVERY - 1)
        assert math.isnan(spacing.overhead)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InvalidInput, match="every: got 0"):
        ReportSpacing(0)
    for budget in (0.0, math.nan):
        with pytest.raises(InvalidInput, match="budget"):
            ReportSpacing(None, budget)


def watched(case: Case, optimizer: torch.optim.Optimizer, **options: Any) -> Watcher:
    watcher = watch(case.model, case.loss, case.data, optimizer, k=2, quiet=True, **options)
    # Else the faster way is timed, and two trainings may find another.
    watcher.objective.multiplier = ChunkMultiplier(11)  # type: ignore[attr-defined]
    return watcher


def train(
    case: Case,
    steps: int,
    batch_size: int = 4,
    watcher: Watcher | None = None,
    begin: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Watcher:
    optimizer = optimizer or torch.optim.SGD(case.model.parameters(), lr=0.05)
    watcher = watcher or watched(case, optimizer, **options)
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            rows = torch.arange(batch_size) + step % 7
            case.loss(case.model(case.data[0][rows]), case.data[1][rows]).backward()
        optimizer.step()
        with torch.no_grad():
            case.model(case.data[0])  # an evaluation is no training
    return watcher


@pytest.mark.parametrize("accumulate", few(1, [3, 1]))
def test_watch_spends_its_budget_and_no_more(accumulate: int) -> None:
    watcher = train(mlp(), 1200, accumulate=accumulate, budget=0.5)
    rows = watcher.history
    full = [row for row in rows if row["sharpness"] is not None]
    quick = [row for row in rows if row["sharpness"] is None]
    assert len(full) > 2
    assert len(quick) > len(full)
    total = quick_total = 0.0
    dearest = {True: 0.0, False: full[0]["report_gradients"]}
    owed = False
    for row in rows:
        kind, cost = row in full, row["report_gradients"]
        total, quick_total = total + cost * 11, quick_total + (0 if kind else cost * 11)
        trained = 4 * accumulate * (row["step"] + 1)
        assert row["overhead"] == pytest.approx(total / trained)
        # The first report is a debt; the quick rows keep to their part meanwhile.
        assert quick_total <= 0.5 * QUICK_SHARE * trained
        within = row["step"] < full[1]["step"] or row["overhead"] <= 0.5
        # A report dearer than all before is a debt too, and no other comes before it is paid.
        dearer = cost > dearest[kind]
        assert within or dearer or (owed and not kind)
        owed = not within and (owed or dearer)
        dearest[kind] = max(dearest[kind], cost)
    # What a report costs is what its row says of the subspace, and the gradient, and little else.
    for row in full[1:]:
        assert row["report_gradients"] - row["subspace_gradients"] >= 1
        assert row["report_gradients"] <= 6 + 1.1 * row["subspace_gradients"]
    for row in quick:
        passes = row["critical_sharpness_passes"]
        assert row["report_gradients"] == pytest.approx(1 + passes / 3 + 8 / 11, rel=1e-9)


def test_every_is_kept_whatever_it_costs() -> None:
    watcher = train(mlp(), 20, every=4, budget=1e-6)
    assert [row["step"] for row in watcher.history] == [0, 4, 8, 12, 16]
    assert all(row["sharpness"] is not None for row in watcher.history)
    assert watcher.history[-1]["overhead"] > 1


def test_a_loss_without_a_model_reports_every_fifty_steps(capsys: Any) -> None:
    from thalweg.loss.function_loss import FunctionLoss
    from thalweg.measure.watch import watch_loss

    theta = torch.ones(3, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0])
    loss = FunctionLoss(lambda t: (weights * t * t).sum(), theta)
    optimizer = torch.optim.SGD([theta], lr=0.01)
    with watch_loss(loss, optimizer, k=1) as watcher:
        for _ in range(2 * EVERY + 1):
            optimizer.zero_grad()
            (weights * theta * theta).sum().backward()
            optimizer.step()
    assert [row["step"] for row in watcher.history] == [0, EVERY, 2 * EVERY]
    assert watcher.history[0]["overhead"] is None
    assert watcher.history[0]["report_gradients"] > 1
    assert "samples are not seen" in capsys.readouterr().err


def test_the_first_report_says_what_it_cost_and_when_the_next_comes(capsys: Any) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    watcher = watch(case.model, case.loss, case.data, optimizer, k=2)
    train(case, 1, optimizer=optimizer, watcher=watcher)
    said = capsys.readouterr().err
    assert f"at 5% of the training the next is at step {watcher.spacing.next_step}" in said
    train(case, 300, begin=1, optimizer=optimizer, watcher=watcher)
    assert "of the training" not in capsys.readouterr().err


def test_a_resumed_watcher_goes_on_as_if_nothing_had_happened() -> None:
    def begun() -> tuple[Case, torch.optim.Optimizer, Watcher]:
        case = mlp()
        optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
        return case, optimizer, watched(case, optimizer, budget=3.0)

    case, optimizer, whole = begun()
    train(case, 400, optimizer=optimizer, watcher=whole)
    case, optimizer, first = begun()
    train(case, 150, optimizer=optimizer, watcher=first)
    saved = copy.deepcopy((case.model.state_dict(), optimizer.state_dict(), first.state_dict()))
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    model, optimizer_state, state = torch.load(buffer, weights_only=True)
    case, optimizer, second = begun()
    case.model.load_state_dict(model)
    optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    train(case, 250, begin=150, optimizer=optimizer, watcher=second)
    joined = first.history + second.history
    assert len(joined) == len(whole.history) > 3
    assert {row["sharpness"] is None for row in second.history} == {True, False}
    for row, expected in zip(joined, whole.history, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }


def test_only_passes_of_the_training_count() -> None:
    model = nn.Linear(3, 2)
    counted = TrainingSamples([model])
    model(input=torch.randn(5, 3))
    copied = copy.deepcopy(model)
    copied(torch.randn(7, 3))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)(torch.randn(7, 3))
    with torch.no_grad():
        model(torch.randn(7, 3))
    assert counted.take() == 5
    counted.close()
    model(torch.randn(7, 3))
    assert counted.take() == 0

    class Step(nn.Linear):
        def forward(self, inputs: torch.Tensor, again: bool = True) -> torch.Tensor:
            return self(inputs, again=False) if again else super().forward(inputs)

    inside = Step(3, 2)
    nested = TrainingSamples([inside])
    for _ in range(2):
        inside(torch.randn(7, 3))
        with pytest.raises(RuntimeError):
            inside(torch.randn(1, 4))
    assert nested.take() == 2 * (7 + 1)
    whole = TrainingSamples([model], whole=True)
    model(torch.randn(7, 3))
    assert whole.take() == 1


def test_what_is_told_counts_where_nothing_is_heard() -> None:
    model = nn.Linear(3, 2)
    counted = TrainingSamples([model])
    counted.tell(5)
    assert counted.take() == 5
    counted.tell(6)
    model(torch.randn(4, 3))
    assert counted.take() == 4
    whole = TrainingSamples([model], whole=True)
    whole.tell(6)
    assert whole.take() == 1


def test_a_training_that_is_told_has_the_spacing_of_one_that_is_heard() -> None:
    heard, told = spaced(tell=False), spaced(tell=True)
    assert len(heard) > 2
    assert told == heard


def spaced(*, tell: bool) -> list[tuple[int, float]]:
    """Steps and overheads of a training through its model, or past its model's forward pass."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(3, 2)), nn.CrossEntropyLoss()
    data = torch.randn(20, 3), torch.randint(0, 2, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, loss, data, optimizer, k=1, budget=0.9, quiet=True) as watcher:
        for step in range(60):
            if step == 30:
                state = watcher.state_dict()
                watcher.load_state_dict(state)
            if tell:
                watcher.note_samples(20)
            optimizer.zero_grad()
            loss(model[0](data[0]) if tell else model(data[0]), data[1]).backward()
            optimizer.step()
    return [(row["step"], row["overhead"]) for row in watcher.history]


@pytest.mark.slow
def test_a_compiled_training_is_not_slowed_by_it_nor_compiled_again() -> None:
    case = mlp()
    counted = TrainingSamples([case.model])
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            case.loss(compiled(case.data[0]), case.data[1]).backward()
    assert counted.samples == 0
