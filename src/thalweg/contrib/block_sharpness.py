"""The average sharpness of each block of a model: trace of its Hessian over its parameters.

    S(b) = tr H_bb / P_b,   H_bb the rows and columns of H of the P_b parameters of block b

The trace is estimated by Hutch++ with products restricted to the block, see `trace_estimation`.
Source: Wang et al. 2025, "The sharpness disparity principle in Transformers" (arXiv 2502.19002),
who approximate H; their code for it is not public. In pre-trained GPT-2 and LLaMA they find
embedding << query-key < feed-forward < value-output << norm. `operator=GaussNewton` gives the part
of H that cannot be negative, the usual approximation.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> found = block_sharpness(objective, {"slope": ["weight"], "level": ["bias"]})
    >>> found["slope"].average, found["level"].num_parameters
    (2.0, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian
from thalweg.operators.restricted import TRANSFORMER_BLOCKS, Restricted, blocks_of, coordinates
from thalweg.operators.symmetric import OperatorAt
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.trace_estimation import trace

MEASURED_BLOCKS = ("embedding", "query_key", "feed_forward", "value_output", "norm")
"""In the order of their average sharpness as published, the flattest first."""

PRODUCTS = 12  # for each block


@dataclass(frozen=True)
class BlockSharpness:
    """The curvature of one block, in units of the loss over theta squared.

    Attributes:
        names: its parameters.
        num_parameters: P_b, their elements.
        average: tr H_bb / P_b.
        standard_error: of `average`, by the random vectors; 0 where every direction was multiplied.
        largest: lambda_1 of H_bb; None where it was not asked for.
    """

    names: tuple[str, ...]
    num_parameters: int
    average: float
    standard_error: float
    largest: float | None = None


def block_sharpness(
    objective: Objective,
    blocks: Mapping[str, Sequence[str]] = TRANSFORMER_BLOCKS,
    *,
    theta: Tensor | None = None,
    samples: Tensor | None = None,
    products: int = 30,
    largest: bool = False,
    operator: OperatorAt = Hessian,
    seed: int = 0,
) -> dict[str, BlockSharpness]:
    """The average sharpness of each block of a model, by block, in the order of its parameters.

    Args:
        objective: the loss.
        blocks: shell patterns of parameter names by block; the first that matches a name decides.
        theta: the point (P,); None for the model's parameters as they are.
        samples: indices of the samples to average over, int64 (n,); None for all.
        products: with the whole operator, for each block, >= 4; see `trace`.
        largest: also lambda_1 of each block, by an eigensolver; its eigenvector is then left out of
            the random part of the trace.
        operator: `Hessian`, or `GaussNewton`.
        seed: of the random vectors.

    Returns:
        Blocks without a parameter are left out. Memory: the graph of all samples that are averaged
        over, kept for all products, and about `products` vectors.

    Raises:
        InvalidInput: no parameter is in a block; too few products; samples or theta that do not
            fit.
        Diverged: a product is NaN or infinite.

    Source and example: see the module.
    """
    whole = operator(objective, theta, samples, keep_graph=True)
    found: dict[str, BlockSharpness] = {}
    for block, names in blocks_of(objective.layout.names, blocks).items():
        part = Restricted(whole, coordinates(objective.layout, names))
        top = top_eigenpairs(part, 1, check_repeated=0) if largest else None
        size = part.shape[0]
        # Of a single parameter nothing is left beside it.
        estimate = trace(part, num_matvecs=products, seed=seed, known=top if size > 1 else None)
        found[block] = BlockSharpness(
            names,
            size,
            estimate.value / size,
            estimate.standard_error / size,
            None if top is None else float(top.eigenvalues[0]),
        )
    return found


@probe("block_sharpness", [f"block_sharpness_{block}" for block in MEASURED_BLOCKS])
def block_sharpness_of_state(state: StepState) -> Mapping[str, Value]:
    """Trace of each block's Hessian over its number of parameters, see `block_sharpness`.

    Of the loss over the mini-batches of `StepState.batch_samples` together, or over all samples
    where these are not more. Not measured in a model without such blocks.

    Source: Wang et al. 2025 (arXiv 2502.19002).
    """
    if not isinstance(state.objective, Objective):  # no names of parameters
        return {}
    try:
        present = blocks_of(state.objective.layout.names)
    except InvalidInput:  # no Transformer
        return {}
    blocks = {block: present[block] for block in MEASURED_BLOCKS if block in present}
    if not blocks:
        return {}
    found = block_sharpness(
        state.objective,
        blocks,
        theta=state.theta,
        samples=_samples(state),
        products=PRODUCTS,
        seed=state.step,
    )
    return {f"block_sharpness_{block}": value.average for block, value in found.items()}


def _samples(state: StepState) -> Tensor | None:
    """Those of all mini-batches of the state, int64 (n,); None where these are all samples."""
    drawn = [samples for samples in state.batch_samples if samples is not None]
    if not drawn or sum(map(len, drawn)) >= state.objective.num_samples:
        return None
    return torch.cat(drawn)
