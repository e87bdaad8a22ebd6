"""What can be measured at a step of training: probes, by name.

A probe names its columns and gives their values from a `StepState`. One of your own is a function:

Example:
    >>> @probe("largest_parameter", ["largest_parameter"])
    ... def largest_parameter(state):
    ...     return {"largest_parameter": float(state.theta.abs().max())}
    >>> probes.pop("largest_parameter").columns
    ('largest_parameter',)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import dot, length, norm
from thalweg.measure.effective_learning_rate import effective_learning_rate
from thalweg.measure.step_state import StepState
from thalweg.registry import probes
from thalweg.sharding import whole

Value = float | Sequence[float] | None
Measure = Callable[[StepState], Mapping[str, Value]]

# Of how many parameters theta itself is written down: a plane or a toy, not a network.
SHOWN_PARAMETERS = 8


@dataclass(frozen=True)
class Probe:
    """Something measured at a step: a name, the columns it fills, and how.

    Attributes:
        name: what specs call it.
        columns: what it fills.
        measure: gives the values by column from the state of a step; None, or no entry, where a
            column is not measured at that step.
        vectors: those of the columns that hold lists of numbers.
        needs_gradient: it uses the full gradient. That is then computed first, so that the loss
            comes with it and the subspace's error is measured by it.
        quick: it costs a few forward passes or gradients, and does not ask for the subspace: in
            `watch` it is measured in quick rows too, see `tier.py`.
    """

    name: str
    columns: tuple[str, ...]
    measure: Measure
    vectors: tuple[str, ...] = ()
    needs_gradient: bool = False
    quick: bool = False


def fit(
    kind: str,
    name: str,
    measure: Measure,
    columns: Sequence[str] = (),
    *,
    vectors: Sequence[str] = (),
    needs_gradient: bool = False,
    quick: bool = False,
) -> Probe:
    """The probe that a function is registered as; without columns it fills the one of its name.

    Raises:
        InvalidInput: one of the columns is another probe's.
    """
    columns = tuple(columns) or (name,)
    taken = {column for other in probes.values() for column in other.columns}
    if clash := taken.intersection(columns):
        raise invalid(f"columns of {kind} {name}", sorted(clash), "names no other probe fills")
    return Probe(name, columns, measure, tuple(vectors), needs_gradient, quick)


def probe(
    name: str,
    columns: Sequence[str] = (),
    *,
    vectors: Sequence[str] = (),
    needs_gradient: bool = False,
    quick: bool = False,
) -> Callable[[Measure], Measure]:
    """Decorator that registers a function of a `StepState` as a probe; also `@register.probe(...)`.

    Args:
        name: what a spec calls it.
        columns: what it fills, by default one column of its name; not filled at a step means not
            measured.
        vectors: those of the columns that hold a list of numbers.
        needs_gradient: whether it uses the full gradient.
        quick: whether it costs a few forward passes or gradients, and does not use the subspace.

    Raises:
        InvalidInput: the name, or one of the columns, is taken.
    """
    return probes.register(
        name, columns=columns, vectors=vectors, needs_gradient=needs_gradient, quick=quick
    )


@probe("loss", ["loss"], quick=True)
def loss(state: StepState) -> Mapping[str, Value]:
    """Full training loss."""
    return {"loss": state.loss}


@probe("test", ["test_loss", "test_accuracy"])
def test(state: StepState) -> Mapping[str, Value]:
    """Loss and accuracy on held-out data."""
    if state.evaluate_test is None:
        return {}
    value, accuracy = state.evaluate_test(state.theta)
    return {"test_loss": value, "test_accuracy": accuracy}


@probe("minibatch_loss", ["minibatch_loss"])
def minibatch_loss(state: StepState) -> Mapping[str, Value]:
    """Loss of the step's mini-batch."""
    return {"minibatch_loss": state.minibatch_loss}


@probe("sharpness", ["sharpness", "lr_sharpness", "eigenvalues"], vectors=["eigenvalues"])
def sharpness(state: StepState) -> Mapping[str, Value]:
    """Tracked eigenvalues, lambda_1 and lr * lambda_1 (2 is the edge of stability of plain GD)."""
    eigenvalues = state.subspace.eigenvalues.tolist()
    return {
        "sharpness": eigenvalues[0],
        "lr_sharpness": state.learning_rate * eigenvalues[0],
        "eigenvalues": eigenvalues,
    }


@probe(
    "solved_eigenvalues",
    ["solved_eigenvalues", "solved_residuals"],
    vectors=["solved_eigenvalues", "solved_residuals"],
)
def solved_eigenvalues(state: StepState) -> Mapping[str, Value]:
    """The top 2k eigenvalues, solved from scratch, with their residuals."""
    if state.solve is None:
        return {}
    k = state.subspace.k if state.k is None else state.k
    solved = state.solve(state.theta, 2 * k)
    residuals = [] if solved.residuals is None else solved.residuals.tolist()
    return {"solved_eigenvalues": solved.eigenvalues.tolist(), "solved_residuals": residuals}


@probe("alignment_gradient", ["alignment_gradient"], needs_gradient=True)
def alignment_gradient(state: StepState) -> Mapping[str, Value]:
    """chi_k of the gradient of the full training loss."""
    return {"alignment_gradient": _alignment(state, state.gradient)}


@probe("alignment_minibatch", ["alignment_minibatch"])
def alignment_minibatch(state: StepState) -> Mapping[str, Value]:
    """chi_k of the gradient of the step's mini-batch."""
    return {"alignment_minibatch": _alignment(state, state.minibatch_gradient)}


@probe("alignment_update", ["alignment_proposed", "alignment_update"])
def alignment_update(state: StepState) -> Mapping[str, Value]:
    """chi_k of the update that the optimizer proposed, and of the update that was made.

    After a split the second is 1 or 0 by construction.
    """
    return {
        "alignment_proposed": _alignment(state, state.proposed),
        "alignment_update": _alignment(state, state.update),
    }


@probe(
    "norms",
    [
        f"{vector}_norm_{part}"
        for vector in ("gradient", "proposed", "update")
        for part in ("dominant", "bulk")
    ],
    needs_gradient=True,
)
def norms(state: StepState) -> Mapping[str, Value]:
    """Norms of both parts of the full gradient, of the proposed update and of the update made."""
    row: dict[str, Value] = {}
    vectors = {"gradient": state.gradient, "proposed": state.proposed, "update": state.update}
    for name, vector in vectors.items():
        if vector is not None:
            dominant, bulk = state.parts(vector)
            row[f"{name}_norm_dominant"] = float(norm(dominant))
            row[f"{name}_norm_bulk"] = float(norm(bulk))
    return row


@probe("displacement", ["displacement_dominant", "displacement_bulk"])
def displacement(state: StepState) -> Mapping[str, Value]:
    """Norms of both parts of theta_t - theta at the branch point, split on S_k there."""
    if state.branch_point is None:
        return {}
    dominant, bulk = state.branch_point.subspace.split(state.theta - state.branch_point.theta)
    return {
        "displacement_dominant": float(norm(dominant)),
        "displacement_bulk": float(norm(bulk)),
    }


@probe(
    "effective_learning_rates",
    [
        "effective_lr_dominant",
        "effective_lr_bulk",
        "lr_numerator_dominant",
        "lr_denominator_dominant",
        "lr_numerator_bulk",
        "lr_denominator_bulk",
    ],
    needs_gradient=True,
)
def effective_learning_rates(state: StepState) -> Mapping[str, Value]:
    """Effective learning rates of the proposed update, with their numerators and denominators.

    For a part Q: -<Q delta, Q g> / norm(Q g)^2 of this step. Over several steps take the ratio of
    sums (`effective_learning_rate`), since a mean of ratios is ruled by steps with a small
    denominator. In float64.

    Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), section 6.
    """
    if state.proposed is None:
        return {}
    row: dict[str, Value] = {}
    pairs = zip(state.parts(state.proposed), state.parts(state.gradient), strict=True)
    for name, (update, gradient) in zip(("dominant", "bulk"), pairs, strict=True):
        update, gradient = update.double(), gradient.double()
        terms = -float(dot(update, gradient)), float(dot(gradient, gradient))
        row[f"effective_lr_{name}"] = effective_learning_rate(*([term] for term in terms))
        row[f"lr_numerator_{name}"], row[f"lr_denominator_{name}"] = terms
    return row


@probe(
    "step_as_a_whole",
    [
        "gradient_norm",
        "minibatch_gradient_norm",
        "update_norm",
        "effective_lr",
        "lr_numerator",
        "lr_denominator",
    ],
    needs_gradient=True,
    quick=True,
)
def step_as_a_whole(state: StepState) -> Mapping[str, Value]:
    """Norms of the full gradient, the mini-batch gradient and the update made, not in parts.

    The effective learning rate is that of the update proposed, -<delta, g> / norm(g)^2, with its
    numerator and denominator: over several steps take the ratio of sums, as for
    `effective_learning_rates`. It costs the gradient. In float64.
    """
    vectors = {
        "gradient": state.gradient,
        "minibatch_gradient": state.minibatch_gradient,
        "update": state.update,
    }
    row: dict[str, Value] = {
        f"{name}_norm": float(norm(vector))
        for name, vector in vectors.items()
        if vector is not None
    }
    if state.proposed is not None:
        gradient = state.gradient.double()
        terms = -float(dot(state.proposed.double(), gradient)), float(dot(gradient, gradient))
        row["effective_lr"] = effective_learning_rate(*([term] for term in terms))
        row["lr_numerator"], row["lr_denominator"] = terms
    return row


@probe("overlap", ["overlap_branch_point"])
def overlap(state: StepState) -> Mapping[str, Value]:
    """Mean squared cosine of S_k with S_k at the branch point."""
    if state.branch_point is None:
        return {}
    return {"overlap_branch_point": state.subspace.overlap(state.branch_point.subspace)}


@probe("subspace_cost", ["subspace_error", "subspace_gradients", "next_eigenvalue"])
def subspace_cost(state: StepState) -> Mapping[str, Value]:
    """The tracker's own error estimate at this step, its cost a step, and lambda_{k+1}.

    The cost is counted in full gradients and averaged over the steps since the last row, renewals
    included; lambda_{k+1} is a bound from below, as of when it was last looked at.
    """
    _ = state.subspace
    report = state.source.report
    gradients = (state.gradients_before + report.subspace_cost) / (state.steps_before + 1)
    return {
        "subspace_error": report.error,
        "subspace_gradients": gradients,
        "next_eigenvalue": report.next_eigenvalue,
    }


@probe("position", ["position"], vectors=["position"])
def position(state: StepState) -> Mapping[str, Value]:
    """theta itself, of problems with at most `SHOWN_PARAMETERS` parameters."""
    if length(state.theta) > SHOWN_PARAMETERS:
        return {}
    return {"position": whole(state.theta).tolist()}


def _alignment(state: StepState, vector: Tensor | None) -> Value:
    if vector is None:
        return None
    size = float(norm(vector))
    return float(norm(state.parts(vector)[0])) / size if size else float("nan")
