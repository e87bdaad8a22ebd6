"""Which layer has a wrong second derivative, or none? Each is tried by itself, inner ones first.

A layer is a function of its inputs and its parameters, and so can be tried like a loss, on the
inputs that it gets in the model. The first that fails, while those inside of it do not, is named;
and functions of `torch.autograd.Function` in it, where there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from thalweg.loss.guards.differences import Comparison, compare, random_like, scales

# Functions of torch's own that do nothing to a derivative.
HARMLESS = frozenset(("CheckpointFunction",))
# Kernels of torch whose second derivative is known to be wrong, by their nodes in the graph.
KNOWN = {"WeightNormInterfaceBackward0": "weight_norm"}


@dataclass(frozen=True)
class LayerFault:
    """A layer whose second derivative is wrong, or does not exist.

    Attributes:
        name: in the model; "" is the model itself.
        kind: its class.
        functions: custom functions in it, and kernels that are known to be wrong.
        error: what torch says, where it has no second derivative at all; else "".
    """

    name: str
    kind: str
    functions: tuple[str, ...]
    error: str = ""

    def __str__(self) -> str:
        layer = f"layer {self.name!r} ({self.kind})" if self.name else f"the model ({self.kind})"
        if not self.functions:
            return layer
        kinds = (
            f"{name} of torch" if name in KNOWN.values() else f"{name} (a torch.autograd.Function)"
            for name in self.functions
        )
        return f"{' or '.join(kinds)} in {layer}"


def first_faulty_layer(
    model: nn.Module,
    evaluate: Callable[[], object],
    settings: Callable[[], AbstractContextManager[object]],
    *,
    raising_alone: bool = False,
) -> LayerFault | None:
    """The innermost layer that is at fault; None where none is by itself.

    Args:
        model: a copy, whose layers are called with its own parameters.
        evaluate: evaluates the model once.
        settings: what layers are to be evaluated in.
        raising_alone: look for a layer that has no second derivative, not for a wrong one.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    modules = dict(model.named_modules())
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)) and None,
            with_kwargs=True,
        )
        for name, module in modules.items()
    ]
    try:
        evaluate()
    except Exception:  # as far as it comes
        pass
    finally:
        for hook in hooks:
            hook.remove()
    deepest_first = sorted(calls, key=lambda name: -len(name.split(".")) if name else 0)
    for name in deepest_first:
        module = modules[name]
        layer = _Layer(module, *calls[name])
        if not layer.sizes:
            continue
        try:
            with settings():
                if raising_alone:
                    layer.product()
                    continue
                fault, error = layer.comparison().agrees is False, ""
        except (RuntimeError, NotImplementedError) as raised:
            fault, error = True, str(raised).splitlines()[0]
        except Exception:  # a layer that cannot be called by itself is not named
            continue
        if fault:
            return LayerFault(name, type(module).__name__, layer.functions, error)
    return None


class _Layer:
    """A layer as a scalar function of its inputs and parameters, one vector."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        leaves, self.structure = tree_flatten((args, kwargs))
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        self.moving = [i for i, leaf in enumerate(self.leaves) if _is_real(leaf)]
        values = [self.leaves[i] for i in self.moving] + list(self.parameters.values())
        self.shapes = [value.shape for value in values]
        self.sizes = [value.numel() for value in values]
        self.functions: tuple[str, ...] = ()
        flat = [value.reshape(-1) for value in values]
        self.start = torch.cat(flat) if flat else torch.empty(0, device="cpu")

    def gradient(self, vector: Tensor, *, create_graph: bool = False) -> Tensor:
        parts = zip(vector.split(self.sizes), self.shapes, strict=True)
        values = [part.reshape(shape) for part, shape in parts]
        leaves = list(self.leaves)
        for i, value in zip(self.moving, values, strict=False):
            leaves[i] = value.clone()  # layers may write into their inputs
        inner = dict(zip(self.parameters, values[len(self.moving) :], strict=True))
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        args, kwargs = tree_unflatten(leaves, self.structure)
        output = functional_call(self.module, {**buffers, **inner}, args, kwargs)
        found = [z for z in tree_leaves(output) if _is_real(z) and z.requires_grad]
        if not found:
            return torch.zeros_like(vector)
        self.functions = tuple(dict.fromkeys(suspects(found)))
        total = sum(
            (z * random_like(z, i)).sum() + (z.square() * random_like(z, i + 1)).sum() / 2
            for i, z in enumerate(found)
        )
        assert isinstance(total, Tensor)
        (gradient,) = torch.autograd.grad(total, vector, create_graph=create_graph)
        return gradient

    def product(self) -> tuple[Tensor, Tensor, Tensor]:
        """A vector, the second derivative times it, and the gradient."""
        theta = self.start.clone().requires_grad_()
        along = scales(self.start, self.sizes) * random_like(self.start, 2)
        gradient = self.gradient(theta, create_graph=True)
        product = torch.zeros_like(along)
        if gradient.requires_grad:
            (found,) = torch.autograd.grad(gradient, theta, along, allow_unused=True)
            product = product if found is None else found
        return along, product, gradient

    def comparison(self) -> Comparison:
        along, product, gradient = self.product()

        def difference(step: float) -> Tensor:
            ends = [
                self.gradient((self.start + sign * step * along).requires_grad_())
                for sign in (1, -1)
            ]
            return (ends[0] - ends[1]) / (2 * step)

        return compare(product, gradient.detach(), difference, self.sizes)


def suspects(outputs: list[Tensor]) -> Iterator[str]:
    """Classes of `torch.autograd.Function`, and known kernels, in the graph of some tensors."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if isinstance(node, BackwardCFunction):
            name = node.name().removesuffix("Backward")
            if name not in HARMLESS:
                yield name
        elif node.name() in KNOWN:
            yield KNOWN[node.name()]
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
