"""Where a loss has kinks: operations whose derivative jumps, found in the graph of the loss.

Across a jump of the gradient a difference of gradients grows as the step shrinks: it is a product
with the Hessian of another, smoothed loss. What matters is the operation, not the module's class
(`F.relu`, `x.clamp(min=0)`, `torch.maximum`), so kinks are read off the names of the graph's nodes;
the layer is the innermost one that was running when the node was made.

Not seen: kinks of functions of `torch.autograd.Function`, and of `torch.where` on a condition that
depends on the parameters. Differences that do not settle show those.

Example:
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> first_kink(model, lambda: model(torch.ones(1, 2)).sum())
    "layer '1' (ReLU)"
    >>> smooth = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.GELU())
    >>> first_kink(smooth, lambda: smooth(torch.ones(1, 2)).sum())
    ''
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.loss.guards.graph import nodes_of, number_of, place_in_time
from thalweg.loss.guards.layer_search import LayerFault

# Of torch's names for backward passes, without "Backward" and a number.
KINKED = frozenset(
    (
        "Abs",
        "AdaptiveMaxPool2D",
        "AdaptiveMaxPool3D",
        "Amax",
        "Amin",
        "Aminmax",
        "Clamp",
        "ClampMax",
        "ClampMin",
        "Cummax",
        "Cummin",
        "FractionalMaxPool2D",
        "FractionalMaxPool3D",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "Kthvalue",
        "LeakyRelu",
        "Max",
        "MaxPool2DWithIndices",
        "MaxPool3DWithIndices",
        "Maximum",
        "Median",
        "Min",
        "Minimum",
        "Mode",
        "MultiMarginLoss",
        "MultilabelMarginLoss",
        "Nanmedian",
        "PreluKernel",
        "Relu",
        "RreluWithNoise",
        "Softshrink",
        "Sort",
        "Threshold",
        "Topk",
    )
)
MAX_OF_BAG = 2
TINY = 1e-5


def first_kink(model: nn.Module, evaluate: Callable[[], Tensor]) -> str:
    """The first operation with a kink, by its layer: "layer '1' (ReLU)"; "" where there is none.

    Args:
        model: whose layers are named; hooks are set while it is evaluated.
        evaluate: gives the loss with its graph, evaluated by operations, not by compiled functions.
    """
    stays: list[tuple[int, int, str, str]] = []
    begun: list[int] = []
    hooks = []

    def enter(*_: Any) -> None:
        begun.append(place_in_time())

    for name, module in model.named_modules():

        def leave(*_: Any, name: str = name, kind: str = type(module).__name__) -> None:
            stays.append((begun.pop(), place_in_time(), name, kind))

        if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            hooks += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
    try:
        loss = evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    found = [node for node in nodes_of(loss.grad_fn) if is_kinked(node)]
    if not found:
        return ""
    first = min(map(number_of, found))
    around = [stay for stay in stays if stay[0] <= first < stay[1]]
    if not around:
        (operation, *_) = (_operation(node) for node in found if number_of(node) == first)
        return f"the loss ({operation})"
    _, _, name, kind = max(around)
    return str(LayerFault(name, kind, ()))


def is_kinked(node: Any) -> bool:
    """Whether the derivative of an operation jumps somewhere, by its node in the graph."""
    operation = _operation(node)
    if operation == "Elu":
        slopes = (node._saved_scale, node._saved_scale * node._saved_alpha * _input_scale(node))
        return float(slopes[0]) != float(slopes[1])
    if operation == "EmbeddingBag":
        return node._saved_mode == MAX_OF_BAG
    if operation == "LinalgVectorNorm":
        return float(node._saved_ord) in (1.0, float("inf"), float("-inf"))
    if operation in ("Clamp", "ClampMin") and _guards_a_norm(node):
        return False
    return operation in KINKED


def _guards_a_norm(node: Any) -> bool:
    """Whether it keeps a norm from zero, as `F.normalize` does."""
    least = getattr(node, "_saved_min", None)
    (inside, _), *_ = node.next_functions
    return (
        isinstance(least, float)
        and 0 < least <= TINY
        and inside is not None
        and _operation(inside) in ("LinalgVectorNorm", "Norm", "Sqrt")
    )


def _input_scale(node: Any) -> float:
    return float(getattr(node, "_saved_input_scale", 1.0))


def _operation(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")
