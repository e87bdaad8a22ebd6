"""The outputs of a model that its loss reads: what a Gauss-Newton matrix is a function of.

A model may return more than its loss uses, such as logits and the features that they were computed
from. Derivatives with respect to several outputs mean something only if each can move by itself. So
a loss gets aliases of the outputs: the same numbers, each a node of its own in the graph, whose
derivative does not run through another.

Example:
    >>> import torch
    >>> features = torch.ones(2, requires_grad=True) * 2
    >>> output = separated({"logits": 3 * features, "features": features})
    >>> loss = output["logits"].sum()
    >>> [int(z[0]) for z in read_by(loss, tuple(tensors_of(output)), ())]
    [6]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from thalweg.errors import InvalidInput


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: in tuples, lists, dicts, dataclasses, other objects."""
    if isinstance(output, Tensor):
        yield output
        return
    for part in _parts(output).values():
        yield from tensors_of(part)


def separated(
    output: Any, depends: Callable[[Tensor], bool] = lambda tensor: tensor.requires_grad
) -> Any:
    """The same output, of whose tensors none is computed from another, to hand to a loss.

    An output of one tensor, or of a kind that cannot be copied, is given back as it is.

    Args:
        depends: whether a tensor depends on the parameters; others stay what they are.
    """
    if sum(map(depends, tensors_of(output))) < 2:
        return output
    return _mapped(output, lambda tensor: tensor.view_as(tensor) if depends(tensor) else tensor)


def read_by(
    loss: Tensor, outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Those of a model's outputs that a loss reads itself, rather than through another one.

    Args:
        loss: a scalar with its graph.
        outputs: of the same graph.
        leaves: the parameters.

    Raises:
        InvalidInput: the loss reads a parameter by another road than an output, or two outputs of
            which one is computed from the other.
    """
    places = {_edge(output): output for output in reversed(outputs)}
    reached = _reached(get_gradient_edge(loss), places)
    if any(leaf.requires_grad and _edge(leaf) in reached for leaf in leaves):
        raise InvalidInput(
            "GaussNewton: the loss depends on the parameters not through the model's outputs alone"
            " (a penalty on the weights, a derivative that the loss takes, a hidden value that the"
            " model does not return); let the model return all that the loss reads, or take the"
            " Hessian"
        )
    read = [output for edge, output in places.items() if edge in reached][::-1]
    for output in read if len(read) > 1 else ():
        others = {_edge(other): other for other in read if other is not output}
        inner = _reached(_edge(output), others, through=True)
        source = next((other for edge, other in others.items() if edge in inner), None)
        if source is not None:
            raise InvalidInput(
                f"GaussNewton: the loss reads an output of shape {tuple(output.shape)} and another"
                f" of shape {tuple(source.shape)} from which it is computed; return the loss's"
                " inputs from the model, and give the loss as a function of them"
            )
    return tuple(read)


def _edge(tensor: Tensor) -> GradientEdge:
    return GradientEdge(*get_gradient_edge(tensor)[:2])


def _reached(
    start: GradientEdge, stops: Mapping[GradientEdge, Any], *, through: bool = False
) -> set[GradientEdge]:
    """The edges of a graph that can be reached without going on behind one of the stops.

    Args:
        through: leave the start, even if it is a stop.
    """
    start = GradientEdge(*start[:2])
    seen, stack = {start}, [start]
    while stack:
        edge = stack.pop()
        if edge in stops and not (through and edge == start):
            continue
        for node, number in edge.node.next_functions:
            following = None if node is None else GradientEdge(node, number)
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return seen


def _parts(output: Any) -> dict[Any, Any]:
    """What an output holds, by key, position or attribute."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if isinstance(output, (nn.Module, type, Callable)) or not hasattr(output, "__dict__"):
        return {}
    return dict(vars(output))


def _mapped(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return function(output)
    parts = _parts(output)
    if not any(True for _ in tensors_of(output)):
        return output
    parts = {key: _mapped(part, function) for key, part in parts.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*parts.values())
    if isinstance(output, (tuple, list)):
        return type(output)(parts.values())
    copied = copy.copy(output)
    if isinstance(output, Mapping):
        for key, part in parts.items():
            copied[key] = part
    else:
        vars(copied).update(parts)
    return copied
