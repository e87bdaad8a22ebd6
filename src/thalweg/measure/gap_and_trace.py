"""Probes of the spectrum as a whole: how wide the gap below lambda_k is, and the Hessian's trace.

In `watch` they are asked with full reports, `probes=["spectral_gap", "trace"]`; in a spec at steps
of its own, `probes = { trace = 100 }`.

Example:
    >>> import torch
    >>> from thalweg.loss.function_loss import FunctionLoss
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> theta = torch.ones(3)
    >>> loss = FunctionLoss(lambda t: (t * t * torch.tensor([3.0, 2.0, 1.0])).sum(), theta)
    >>> source = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.tensor([6.0])))
    >>> trace_of_state(StepState(0, theta, loss, source, learning_rate=0.1))
    {'trace': 12.0, 'trace_error': 0.0, 'trace_products': 3}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.trace_estimation import trace

PRODUCTS = 12
"""With the Hessian, for one estimate of its trace."""


@probe("spectral_gap", ["spectral_gap", "spectral_gap_error"])
def spectral_gap(state: StepState) -> Mapping[str, Value]:
    """(lambda_k - lambda_{k+1}) / lambda_k: 1 is the widest of a positive spectrum, 0 is closed.

    From above: the subspace's source knows lambda_{k+1} as a Rayleigh quotient, a bound from below,
    as of when it was last looked at. The error is that by lambda_k, None where not known. Costs
    nothing beside the subspace. Not measured where the source does not look below lambda_k, or
    lambda_k is not above 0.
    """
    last = float(state.subspace.eigenvalues[-1])
    report = state.source.report
    if not (last > 0 and math.isfinite(report.next_eigenvalue)):
        return {}
    row: dict[str, Value] = {"spectral_gap": 1 - report.next_eigenvalue / last}
    if report.eigenvalue_errors:
        error = report.eigenvalue_errors[-1]
        row["spectral_gap_error"] = abs(report.next_eigenvalue) * error / last**2
    return row


@probe("trace", ["trace", "trace_error", "trace_products"])
def trace_of_state(state: StepState) -> Mapping[str, Value]:
    """The trace of the Hessian (Hutch++), its standard error, in its unit, and the products taken.

    Random vectors are a function of the step. Costs a gradient and `PRODUCTS` products with the
    Hessian, 16 gradients together; with so few parameters that those are all, it is exact.

    Source: Meyer et al. 2021 (arXiv 2010.09649), see `trace_estimation`.
    """
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    found = trace(hessian, num_matvecs=PRODUCTS, seed=state.step)
    return {
        "trace": found.value,
        "trace_error": found.standard_error,
        "trace_products": found.num_matvecs,
    }
