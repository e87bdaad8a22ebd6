"""What the graph of a loss tells about the model, after its first evaluation.

Other tensors than the model's own parameters are differentiated by. A forward pass that reaches a
parameter by another road than the module's attribute (a closure, a list) shows by the parameter in
the graph of the loss. So does what would fail or mislead later: a tensor that was computed from a
parameter before, checkpoints that can only be differentiated by `backward()`, sparse gradients,
gradients that are scaled by how often an entry is used.

Example:
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> facts_of((2 * weight).sum(), {"weight": weight}, begin=0).reached
    ('weight',)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from thalweg.errors import DifferentiableOnce, InvalidInput

# Of torch's names for the backward passes of operations whose result shares its memory.
VIEWS = (
    "Alias",
    "AsStrided",
    "Diagonal",
    "Expand",
    "Permute",
    "ReshapeAlias",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Squeeze",
    "T",
    "Transpose",
    "Unbind",
    "Unflatten",
    "Unfold",
    "Unsqueeze",
    "UnsafeView",
    "View",
    "ViewAsComplex",
    "ViewAsReal",
)
# What helps a loss that can be differentiated once.
BY_GRADIENTS = 'take products by gradients alone, product="difference"'
REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class GraphFacts:
    """What is in the graph of a loss.

    Attributes:
        reached: names of the model's own parameters in it.
        computed_before: those of them from which something was computed before the evaluation
            that is no view of them, so that it cannot follow.
        sparse: whether an operation has a sparse gradient.
        reentrant: whether a part is checkpointed with `use_reentrant=True`.
        scaled_by_count: whether an embedding divides its gradient by how often an entry is used.
    """

    reached: tuple[str, ...]
    computed_before: tuple[str, ...]
    sparse: bool
    reentrant: bool
    scaled_by_count: bool


class ReadsOf(TorchFunctionMode):
    """Notes which functions a backward pass calls from Python, while it is entered.

    Args:
        loss: that is differentiated: what torch calls before its backward pass does not count.
        tensors: those to look out for.

    Attributes:
        any: whether a function was called at all.
        tensors: whether one was called with one of the tensors.
    """

    def __init__(self, loss: Tensor, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._ids = set(map(id, tensors))
        self._begun = self.any = self.tensors = False
        if loss.requires_grad:
            loss.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        self._begun = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        named = kwargs or {}
        given = (*args, *named.values())
        if self._begun:
            self.any = True
            self.tensors |= any(id(argument) in self._ids for argument in given)
        return func(*args, **named)


def place_in_time() -> int:
    """The number of the next operation that autograd records in this thread."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True, device="cpu").clone().grad_fn
    return number_of(node)


def facts_of(loss: Tensor, parameters: Mapping[str, Tensor], begin: int) -> GraphFacts:
    """Look through the graph of a loss; 1 to 2 us for each of its operations.

    Args:
        parameters: the model's own, by name.
        begin: `place_in_time` before the evaluation.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    reached: dict[str, None] = {}
    before: dict[str, None] = {}
    sparse = reentrant = scaled_by_count = False
    for node, stale in _nodes(loss.grad_fn, begin):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) in names:
            reached[names[id(variable)]] = None
            if stale:
                before[names[id(variable)]] = None
        sparse |= bool(
            getattr(node, "_saved_sparse", False) or getattr(node, "_saved_sparse_grad", False)
        )
        reentrant |= node.name() == REENTRANT
        scaled_by_count |= bool(getattr(node, "_saved_scale_grad_by_freq", False))
    return GraphFacts(tuple(reached), tuple(before), sparse, reentrant, scaled_by_count)


def refuse_reentrant(facts: GraphFacts) -> None:
    """Raise where a checkpoint can't be differentiated but by `backward()`.

    Raises:
        DifferentiableOnce: a part of the model is checkpointed with `use_reentrant=True`.
    """
    if facts.reentrant:
        raise DifferentiableOnce(
            "model: a part of it is checkpointed by torch.utils.checkpoint with use_reentrant=True,"
            " which has no second derivative; pass use_reentrant=False (of Hugging Face:"
            " model.gradient_checkpointing_enable({'use_reentrant': False})), or " + BY_GRADIENTS
        )


def refuse_scaled_by_count(facts: GraphFacts) -> None:
    """Raise where a gradient is not that of the loss, and depends on which samples share a batch.

    Raises:
        InvalidInput: an embedding has `scale_grad_by_freq=True`.
    """
    if facts.scaled_by_count:
        raise InvalidInput(
            "model: an embedding with scale_grad_by_freq=True divides its gradient by how often an"
            " entry is used in a batch, which is the gradient of no loss; set"
            " layer.scale_grad_by_freq = False"
        )


def refuse_computed_before(facts: GraphFacts) -> None:
    """Raise where something in the loss cannot follow the parameter that it was computed from.

    Raises:
        InvalidInput: a tensor was computed from a parameter before the loss was evaluated.
    """
    if facts.computed_before:
        raise InvalidInput(
            f"parameter {facts.computed_before[0]!r}: the loss uses a tensor that was computed from"
            " it before, and does not follow when the parameter changes; compute it inside of"
            " forward, or detach it where it is a constant"
        )


def nodes_of(root: Any) -> Iterator[Any]:
    """Each node of a graph, once; inside of what is checkpointed with `use_reentrant=True` too."""
    for node, _ in _nodes(root, 0):
        yield node
        if node.name() == REENTRANT:
            yield from nodes_of(_recomputed(node))


def _recomputed(node: Any) -> Any:
    """The end of the graph of what a reentrant checkpoint evaluates again in its backward pass."""
    inputs = list(node.inputs)
    for place, tensor in zip(node.tensor_indices, node.saved_tensors, strict=True):
        inputs[place] = tensor.detach().requires_grad_(tensor.requires_grad)
    outputs = node.run_function(*inputs)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    parts = [z.sum() for z in tensors if isinstance(z, Tensor) and z.requires_grad]
    return sum(parts).grad_fn if parts else None  # type: ignore[union-attr]


def _nodes(root: Any, begin: int) -> Iterator[tuple[Any, bool]]:
    """Each node of a graph, and whether it is reached through a result made before that copies."""
    # Held until the end: a node's Python object is made anew where none is held.
    seen: dict[Any, bool] = {}
    waiting = [(root, False)]
    while waiting:
        node, stale = waiting.pop()
        if node is None or seen.get(node) in (stale, True):
            continue
        number = number_of(node)
        stale = stale or (number < begin and not _is_view(node))
        seen[node] = stale
        yield node, stale
        waiting.extend((child, stale) for child, _ in node.next_functions)


def number_of(node: Any) -> int:
    """When an operation was recorded: a number that grows in each thread."""
    return node._sequence_nr()


def _is_view(node: Any) -> bool:
    return node.name().rstrip("0123456789").removesuffix("Backward") in VIEWS
