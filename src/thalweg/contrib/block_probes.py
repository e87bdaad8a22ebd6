"""The average sharpness of the blocks of a Transformer, at a step of training.

Example:
    >>> from thalweg.registry import probes
    >>> probes["block_sharpness"].columns[0]
    'block_sharpness_embedding'
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thalweg.contrib.block_sharpness import block_sharpness
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.restricted import blocks_of

MEASURED_BLOCKS = ("embedding", "query_key", "feed_forward", "value_output", "norm")
"""In the order of their average sharpness as published, the flattest first."""

PRODUCTS = 12  # for each block


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
