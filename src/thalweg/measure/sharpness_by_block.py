"""The sharpness of each block of a model: embedding, attention, feed-forward, norm, or by layer.

    lambda_1 of H_bb,   the rows and columns of H of block b's parameters

That is how sharp the loss is where only this block moves: never above the sharpness of all, and the
block that comes near to it is where the sharp direction lies. (`contrib.block_sharpness` is the
other measure of that name, trace over number of parameters.)

`watch(..., probes=["sharpness_by_block"])` takes `MODEL_BLOCKS`; blocks of your own are a probe:

Example:
    >>> by_layer = sharpness_by_block({"first": ["0.*"], "second": ["2.*"]})
    >>> by_layer.columns
    ('sharpness_by_block/first', 'sharpness_by_block/second', 'sharpness_by_block_error')
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> linear, identity = torch.nn.Linear, torch.nn.Identity()
    >>> model = torch.nn.Sequential(linear(1, 1), identity, linear(1, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.ones(4, 1), torch.ones(4, 1)))
    >>> source = FixedSubspace(Subspace(torch.eye(4)[:, :1], torch.tensor([9.0])))
    >>> state = StepState(0, torch.tensor([1.0, 0.0, 2.0, 0.0]), objective, source, 0.1)
    >>> row = by_layer.measure(state)
    >>> [round(row[column], 2) for column in by_layer.columns[:2]]  # 2 * 4 * 2, and 2 * 2
    [16.0, 4.0]
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence

from thalweg.errors import invalid
from thalweg.loss.objective import Objective
from thalweg.measure.probes import Probe, Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian
from thalweg.operators.restricted import MODEL_BLOCKS, Restricted, blocks_of, coordinates
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs

TOLERANCE = 0.01
"""Of a residual, relative to the eigenvalue. At 0.03, one or two products a block cheaper, one of
120 small blocks was taken for done at its second eigenvalue.
"""
MOST_PRODUCTS = 25
"""For each block; what is less exact then says so in its error."""
NAME = "sharpness_by_block"


def sharpness_by_block(blocks: Mapping[str, Sequence[str]] = MODEL_BLOCKS) -> Probe:
    """A probe of the largest eigenvalue of each block's own Hessian.

    Args:
        blocks: shell patterns of parameter names by block; the first that matches a name decides,
            and what matches none is in no block. Such as `MODEL_BLOCKS`, or
            `layers_of(name for name, _ in model.named_parameters())`.

    Returns:
        A probe with a column "sharpness_by_block/<block>" for each, in units of the Hessian, None
        where the model has none of its parameters; `sharpness_by_block_error` is the largest
        residual of them, relative to its value: an eigenvalue of the block is no farther, and the
        error, its square over the gap, usually a tenth of that. For each block it costs up to
        `MOST_PRODUCTS` products with the whole Hessian, some ten usually. Not measured of a loss
        without names of parameters.

    Raises:
        InvalidInput: no block.

    Source: Sankar et al. 2021 (arXiv 2012.03801), layer by layer. Example: see the module.
    """
    if not blocks:
        raise invalid("blocks", dict(blocks), "patterns of parameter names by block")
    columns = (*(f"{NAME}/{block}" for block in blocks), f"{NAME}_error")
    return Probe(NAME, columns, functools.partial(_measure, blocks))


def _measure(blocks: Mapping[str, Sequence[str]], state: StepState) -> Mapping[str, Value]:
    if not isinstance(state.objective, Objective):  # no names of parameters
        return {}
    layout = state.objective.layout
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    row: dict[str, Value] = {}
    worst = 0.0
    for block, names in blocks_of(layout.names, blocks).items():
        part = Restricted(hessian, coordinates(layout, names))
        with warnings.catch_warnings():
            # The row has the error that was reached.
            warnings.simplefilter("ignore", NotConverged)
            top = top_eigenpairs(
                part, 1, tolerance=TOLERANCE, max_matvecs=MOST_PRODUCTS, check_repeated=0
            )
        row[f"{NAME}/{block}"] = float(top.eigenvalues[0])
        assert top.residuals is not None
        worst = max(worst, float(top.residuals[0]))
    return row | {f"{NAME}_error": worst}


_OF_MODELS = sharpness_by_block()


@probe(NAME, _OF_MODELS.columns)
def sharpness_by_model_block(state: StepState) -> Mapping[str, Value]:
    """lambda_1 of the Hessian of each of `MODEL_BLOCKS`, and their largest relative residual.

    Blocks that the model has no parameter of are not measured. Costs some ten products with the
    Hessian for each of the others. See `sharpness_by_block` for blocks of your own.
    """
    return _OF_MODELS.measure(state)
