from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import dense
from tests.measure.test_report_spacing import train, watched
from tests.networks import Case, mlp, silu
from thalweg import registry, watch
from thalweg.errors import InvalidInput
from thalweg.integrations.dashboards import scalars
from thalweg.measure.alarm import Alarm
from thalweg.measure.probes import Probe
from thalweg.measure.sinks import WatchWarning
from thalweg.measure.tier import MOST_FAILURES, QUICK, QUICK_SHARE, tiers
from thalweg.measure.watcher import COLUMNS, Watcher

SUBSPACE = (
    "sharpness",
    "eigenvalues",
    "alignment_gradient",
    "effective_lr_bulk",
    "stability_margin",
)


@given(
    budget=st.floats(0.01, 1.0),
    rate=st.integers(1, 200),
    first=st.integers(500, 10_000),
    costs=st.lists(
        st.tuples(st.integers(100, 3_000), st.integers(1, 100)), min_size=5, max_size=40
    ),
)
def test_both_tiers_together_keep_the_budget(
    budget: float, rate: int, first: int, costs: list[tuple[int, int]]
) -> None:
    full, quick = (tier.spacing for tier in tiers(every=None, quick_every=None, budget=budget))
    assert full.budget + quick.budget == pytest.approx(budget)
    counted = step = 0
    spent = {"full": 0, "quick": 0}
    for number, (dear, cheap) in enumerate(costs):
        dear = first if number == 0 else dear
        trained, counted = rate * (step + 1 - counted), step + 1
        if full.is_due(step):
            # But for the first, and what is dearer than any before.
            allowed = budget * rate * step * (1 + 1e-9)
            assert number == 0 or spent["full"] + full.dearest + spent["quick"] <= allowed
            spent["full"] += dear
            full.note(step, dear, trained)
            quick.forgo(step, cheap, trained)
        else:
            allowed = budget * QUICK_SHARE * rate * step * (1 + 1e-9)
            assert spent["quick"] + quick.dearest <= allowed
            spent["quick"] += cheap
            quick.note(step, cheap, trained)
            full.training += trained
        assert (full.cost, quick.cost) == (spent["full"], spent["quick"])
        step = min(full.next_step, quick.next_step)
        assert step > counted - 1


def test_a_quick_row_does_not_follow_at_the_heels_of_a_report() -> None:
    _, quick = (tier.spacing for tier in tiers(every=None, quick_every=None, budget=0.75))
    quick.forgo(0, 30.0, 3.0)
    # Twice 30, that of this row as well, at a quarter of 3 a step.
    assert quick.next_step == 80
    quick.note(80, 30.0, 240.0)
    assert quick.next_step == 120
    # A report at 110 had all of it: the next is where it would be after one of its own.
    quick.forgo(110, 30.0, 90.0)
    assert quick.next_step == 160


def rows_of(watcher: Watcher) -> dict[int, bool]:
    """Whether each row is a full report, by step."""
    return {row["step"]: row["sharpness"] is not None for row in watcher.history}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": 4}, {0: True, 4: True, 8: True}),
        ({"every": 4, "quick_every": 0}, {0: True, 4: True, 8: True}),
        (
            {"every": 4, "quick_every": 3},
            {0: True, 3: False, 4: True, 6: False, 8: True, 9: False},
        ),
        ({"budget": 1e-6, "quick_every": 5}, {0: True, 5: False, 10: False}),
        ({"budget": 1e-6, "quick_every": 0}, {0: True}),
    ],
)
def test_with_fixed_steps_rows_are_what_was_asked_for(
    options: dict[str, Any], expected: dict[int, bool]
) -> None:
    assert rows_of(train(mlp(), 11, **options)) == expected


def test_columns_of_quick_rows_follow_the_others_and_come_only_with_them() -> None:
    plain = train(mlp(), 1, every=4)
    assert tuple(plain.history[0]) == COLUMNS
    row = train(mlp(), 1, every=4, quick_every=2).history[0]
    added = [c for name in QUICK for c in registry.probes[name].columns if c not in COLUMNS]
    assert list(row) == [*COLUMNS, *added]
    with pytest.raises(InvalidInput, match="quick_every: got -1"):
        train(mlp(), 1, quick_every=-1)


def gradient_at(case: Case, theta: Tensor) -> Tensor:
    return dense.gradient(dense.flat_loss(case), theta)


def test_a_quick_row_is_right_and_leaves_out_what_needs_the_subspace() -> None:
    case = silu().to(torch.float64)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    terms: list[tuple[Tensor, Tensor]] = []
    with watch(
        case.model, case.loss, case.data, optimizer, k=2, every=4, quick_every=1, quiet=True
    ) as watcher:
        for _ in range(6):
            theta = dense.flat_parameters(case)
            optimizer.zero_grad()
            rows = torch.arange(5)
            case.loss(case.model(case.data[0][rows]), case.data[1][rows]).backward()
            seen = torch.cat([p.grad.reshape(-1) for p in case.model.parameters()])  # type: ignore[union-attr]
            optimizer.step()
            terms.append((gradient_at(case, theta), dense.flat_parameters(case) - theta))
            row = watcher.history[-1]
            gradient, update = terms[-1]
            assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)
            assert row["minibatch_gradient_norm"] == pytest.approx(float(seen.norm()), rel=1e-9)
            assert row["update_norm"] == pytest.approx(float(update.norm()), rel=1e-9)
            rate = -sum(float(g @ d) for g, d in terms) / sum(float(g @ g) for g, _ in terms)
            assert row["effective_lr"] == pytest.approx(rate, rel=1e-9)
            assert row["stability_threshold"] == pytest.approx(2 * 1.9 / 0.1)
            assert row["loss"] == pytest.approx(float(dense.flat_loss(case)(theta)), rel=1e-9)
            full = row["step"] % 4 == 0
            assert [row[column] is not None for column in SUBSPACE] == [full] * len(SUBSPACE)
            assert row["gradient_noise_scale"] > 0
            assert row["critical_sharpness_passes"] >= 0


def test_effective_rates_in_parts_are_over_reports_alone() -> None:
    whole = train(mlp(), 30, every=3).history
    both = [r for r in train(mlp(), 30, every=3, quick_every=1).history if r["sharpness"]]
    assert [r["effective_lr_bulk"] for r in both] == [r["effective_lr_bulk"] for r in whole]


def test_probes_that_are_quick_are_asked_in_every_row_others_in_reports() -> None:
    counted = Probe("counted", ("counted",), lambda state: {"counted": state.step}, quick=True)
    asked = ["directional_sharpness", "spectral_gap", counted]
    rows = train(mlp(), 4, every=2, quick_every=1, probes=asked).history
    for row in rows:
        assert row["directional_sharpness_update"] is not None
        assert row["counted"] == row["step"]
        assert (row["spectral_gap"] is not None) == (row["sharpness"] is not None)
    # Without quick rows they are in the reports.
    alone = train(mlp(), 4, every=2, probes=asked).history
    assert [row["counted"] for row in alone] == [0, 2]


def test_dashboards_are_not_given_what_a_quick_row_lacks() -> None:
    sent: list[dict[str, float]] = []
    train(mlp(), 4, every=3, quick_every=1, sinks=[lambda row, step: sent.append(scalars(row))])
    assert ["thalweg/sharpness" in row for row in sent] == [True, False, False, True]
    assert all("thalweg/gradient_norm" in row for row in sent)
    assert all(math.isfinite(value) for row in sent for value in row.values())


def test_an_alarm_counts_the_rows_that_have_its_column() -> None:
    alarms = [Alarm(column, above=0.0, reports=2) for column in ("sharpness", "gradient_norm")]
    with pytest.warns(WatchWarning, match="for 2 reports"):
        train(mlp(), 7, every=3, quick_every=1, sinks=alarms)
    assert [alarm.steps for alarm in alarms] == [[3], [1]]


def test_the_console_shows_reports_alone(capsys: pytest.CaptureFixture) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    options: dict[str, Any] = {"k": 2, "every": 3, "quick_every": 1}
    with watch(case.model, case.loss, case.data, optimizer, **options) as watcher:
        train(case, 5, watcher=watcher, optimizer=optimizer)
    heading, *lines = capsys.readouterr().err.splitlines()
    assert heading.split()[0] == "step"
    assert [line.split()[0] for line in lines] == ["0", "3"]
    assert len(watcher.history) == 5


def broken(state: Any) -> dict[str, float]:
    _ = torch.rand(3), random.random()
    raise LookupError("of a probe")


def test_quick_rows_that_fail_end_by_themselves_and_reports_go_on() -> None:
    failing = Probe("failing", ("failing",), broken, quick=True)
    with pytest.warns(WatchWarning) as seen:
        rows = train(mlp(), 9, every=4, quick_every=1, probes=[failing]).history
    steps = {row["step"]: row["failure"] for row in rows}
    # The report at step 0 is whole but for what quick rows have.
    assert list(steps) == [0, 1, 2, 4, 8]
    assert steps == {0: "LookupError: of a probe"} | {
        1: "LookupError: of a probe", 2: "LookupError: of a probe", 4: None, 8: None,
    }  # fmt: skip
    assert all(row["sharpness"] is not None for row in (rows[0], rows[3], rows[4]))
    assert rows[0]["report_gradients"] > 1
    said = [str(one.message) for one in seen if one.category is WatchWarning]
    assert said[0] == "step 0: LookupError: of a probe; this quick row is not complete"
    assert said[-1].startswith(f"{MOST_FAILURES} quick rows in a row failed: no more are made")
    assert len(said) == MOST_FAILURES + 1


def test_reports_that_fail_end_by_themselves_and_quick_rows_go_on() -> None:
    failing = Probe("failing", ("failing",), broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)
        watcher = train(mlp(), 11, every=3, quick_every=2, probes=[failing])
    rows = {row["step"]: row["failure"] is not None for row in watcher.history}
    assert rows == {0: True, 2: False, 3: True, 4: False, 6: True, 8: False, 10: False}
    assert not watcher.ended


def failing_at_first() -> tuple[Case, torch.optim.Optimizer, Watcher]:
    """A training whose subspace costs 30 gradients at step 0, and then fails."""
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    watcher = watched(case, optimizer, quick_every=20, budget=100.0)
    update = watcher.source.update

    def fails(theta: Tensor, gradient: Tensor | None = None) -> Any:
        if watcher.step > 0:
            return update(theta, gradient)
        for _ in range(30):
            watcher.objective.value_and_gradient(theta)
        raise MemoryError("full")

    watcher.source.update = fails  # type: ignore[method-assign]
    return case, optimizer, watcher


def test_what_a_failed_report_cost_is_paid_by_reports_also_after_a_resume() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the failure, and of a gap
        case, optimizer, whole = failing_at_first()
        train(case, 60, watcher=whole, optimizer=optimizer)
        case, optimizer, first = failing_at_first()
        train(case, 30, watcher=first, optimizer=optimizer)
        held, state = copy.deepcopy((case.model.state_dict(), first.state_dict()))
        case, optimizer, second = failing_at_first()
        case.model.load_state_dict(held)
        second.load_state_dict(state)
        train(case, 30, begin=30, watcher=second, optimizer=optimizer)
    assert rows_of(whole) == {0: False, 20: False, 40: False, 50: True}
    failed, *quick, report = whole.history
    assert failed["report_gradients"] is None
    assert all(row["report_gradients"] < 5 for row in quick)
    assert report["report_gradients"] >= 31 + report["subspace_gradients"]
    for column in ("step", "report_gradients", "overhead"):
        assert second.history[-1][column] == report[column]


def test_the_training_is_bit_for_bit_what_it_is_without() -> None:
    def trained(watched: bool) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        inputs, targets, loss = (
            torch.randn(20, 4),
            torch.randint(0, 3, (20,)),
            nn.CrossEntropyLoss(),
        )
        options: dict[str, Any] = {"every": 4, "quick_every": 1, "quiet": True}
        watcher = watch(model, loss, (inputs, targets), optimizer, **options) if watched else None
        for _ in range(6):
            rows = torch.randint(0, 20, (8,))
            optimizer.zero_grad()
            loss(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        assert watcher is None or len(watcher.history) == 6
        held = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        return held, torch.rand(3)

    (first, drawn), (second, again) = trained(False), trained(True)
    assert torch.equal(drawn, again)
    assert repr(first) == repr(second)
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


def test_a_state_from_before_quick_rows_is_read() -> None:
    former = train(mlp(), 20, budget=0.5, quick_every=0)
    state = former.state_dict()
    full = state.pop("tiers")["full"]
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    now = watch(case.model, case.loss, case.data, optimizer, k=2, quiet=True)
    now.load_state_dict({**state, **full})
    assert now.spacing.state_dict() == former.spacing.state_dict()
    assert now.step == 20
