"""Learning rates by block of a Transformer, as groups of parameters for any optimizer.

The flatter a block, the larger its rate: in the published setting for AdamW norms have the base
rate, the token embedding ten times that. What is in no block, or in one without a rate (output
head, position embeddings), has the base rate.

A schedule that multiplies all rates by one factor (`LambdaLR`, and those of Thalweg's lab) keeps
their ratios. In the public code each block instead goes from its own peak to a common floor, so
that the ratios shrink to 1: that is `CosineAnnealingLR(optimizer, T_max, eta_min=floor)`, which
does so with each group. A decoupled weight decay, as AdamW's, grows with the rate of the block in
either.

Source: Wang et al. 2025, "The sharpness disparity principle in Transformers" (arXiv 2502.19002);
public code Wongboo/BlockwiseLearningRate.

Example:
    >>> import torch
    >>> from torch import nn
    >>> model = nn.ModuleDict({"wte": nn.Embedding(5, 2), "ln_f": nn.LayerNorm(2)})
    >>> groups = blockwise_groups(model, lr=0.5)
    >>> [(group["block"], group["lr"]) for group in groups]
    [('embedding', 5.0), ('norm', 0.5)]
    >>> optimizer = torch.optim.AdamW(groups)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from thalweg.errors import invalid
from thalweg.operators.restricted import TRANSFORMER_BLOCKS, blocks_of

PAPER_RATES: Mapping[str, float] = MappingProxyType(
    {"norm": 1.0, "value_output": 4.0, "feed_forward": 6.0, "query_key": 8.0, "embedding": 10.0}
)
"""Multiples of the base rate by block, for AdamW (Wang et al. 2025)."""

QUERY_KEY_VALUE = ("c_attn", "in_proj_", "qkv", "query_key_value")
"""Parts of the names of query, key and value in one map."""

OTHER = "other"
"""What `block` is in the group of the parameters that have the default rate."""


class OutsideOfBlocks(UserWarning):
    """Parameters have the default rate since no pattern of a block matches their names."""


def blockwise_groups(
    parameters: nn.Module | Iterable[tuple[str, Tensor]],
    lr: float,
    rates: Mapping[str, float] = PAPER_RATES,
    *,
    default: float = 1.0,
    blocks: Mapping[str, Sequence[str]] = TRANSFORMER_BLOCKS,
) -> list[dict[str, Any]]:
    """Groups of parameters, each with its own learning rate, to build an optimizer with.

    Args:
        parameters: a model, or pairs of name and tensor; those that require no gradient are left
            out.
        lr: the base rate.
        rates: multiple of the base rate by block, > 0.
        default: that of all other parameters, > 0.
        blocks: shell patterns of names by block; the first that matches a name decides.

    Returns:
        A group for each block with a rate and a parameter, in the order of the parameters, then one
        of all others: its `params` as pairs of name and tensor, its `lr`, that as a multiple of the
        base rate as `relative_lr`, and the name of the `block`.

    Raises:
        InvalidInput: a rate of a block that `blocks` does not have, or that is not above 0; no
            parameter in any block.

    Warns:
        OutsideOfBlocks: with the patterns of `TRANSFORMER_BLOCKS`, where some of them match no
            name, once a call, with their names. Query, key and value in one map are among them.

    Source and example: see the module.
    """
    for block, rate in {**rates, "default": default}.items():
        if block not in blocks and block != "default":
            raise invalid("rates", block, "blocks " + ", ".join(blocks))
        if not (rate > 0 and math.isfinite(rate)):
            raise invalid(f"rate of {block}", rate, "a number > 0")
    given = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    named = {name: tensor for name, tensor in given if tensor.requires_grad}
    found = blocks_of(named, blocks)
    if blocks is TRANSFORMER_BLOCKS:
        _say_which_are_outside(set(named).difference(*found.values()), default)
    chosen = {block: names for block, names in found.items() if block in rates}
    taken = {name for names in chosen.values() for name in names}
    rest = tuple(name for name in named if name not in taken)
    if rest:
        chosen[OTHER] = rest
    return [
        {
            "params": [(name, named[name]) for name in names],
            "lr": lr * (rate := default if block == OTHER else rates[block]),
            "relative_lr": rate,
            "block": block,
        }
        for block, names in chosen.items()
    ]


def _say_which_are_outside(names: set[str], default: float) -> None:
    if not names:
        return
    fused = sorted(name for name in names if any(part in name for part in QUERY_KEY_VALUE))
    hint = "give patterns that match them, by blocks="
    if fused:
        hint += f"; {fused[0]} is query, key and value in one, for which no rate was published"
    warnings.warn(
        f"blockwise_groups: {', '.join(sorted(names))}: in no block, and so at {default:g} times"
        f" the base rate; {hint}",
        OutsideOfBlocks,
        stacklevel=3,
    )
