"""Large cross-entropies and attentions whose second derivative keeps little: closed or recomputed.

The double backward of log-softmax keeps about ten times the logits. Its closed form needs the
logits alone: with p = softmax(z) and the classes y,

    dL/dz = p - y,    d(dL/dz)^T u = p (u - <p, u>).

Attention that can be differentiated twice keeps several (length x length) matrices a head, for all
layers at once. Here a layer keeps query, key and value, and what it forms of them lives while its
own derivative is computed: it is formed again for each product.

Both are the functions of torch, to rounding, and can be differentiated as often as one likes. They
take the place of `F.cross_entropy` and `F.scaled_dot_product_attention` while `LargeOperations` is
entered, from a size on; what they do not cover (class weights, label smoothing, targets that are
probabilities, dropout, transforms of `torch.func`) is left to torch.

Source: measured, `docs/products.md`.

Example:
    >>> import torch
    >>> logits = torch.randn(300, 5000, requires_grad=True)
    >>> target = torch.arange(300)
    >>> with LargeOperations():
    ...     loss = torch.nn.functional.cross_entropy(logits, target)
    >>> type(loss.grad_fn.next_functions[0][0]).__name__
    '_CrossEntropyBackward'
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, target))
    True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MANY_CLASSES = 1024
LEAST_LOGITS = 2**20
"""From so many classes and logits on the closed form is taken: memory counts there."""
LEAST_SCORES = 2**24
"""Numbers in the (length x length) matrices of an attention, from which on they are recomputed: a
product takes 1.2 to 1.3 times as long then, and is worth it where memory counts."""
LONG = 256
ROWS = 32
"""Rows of logits that are worked on at a time."""


@dataclass
class Sought:
    """What is known of a model: a mode costs some us for each operation, so few are to have it.

    Attributes:
        seen: whether a function of such a kind was called, with however few samples.
        wanted: whether there may be more.
    """

    seen: bool = False
    wanted: bool = True


class LargeOperations(TorchFunctionMode):
    """Puts the functions of this module in the place of torch's, while it is entered.

    Args:
        sought: notes what was seen.

    Attributes:
        least_logits, least_scores: how large they have to be.
    """

    least_logits = LEAST_LOGITS
    least_scores = LEAST_SCORES

    def __init__(self, sought: Sought | None = None) -> None:
        super().__init__()
        self.sought = sought or Sought()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        named = dict(kwargs or {})
        if func is functional.cross_entropy:
            return self._cross_entropy(*args, **named)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **named)
        return func(*args, **named)

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        many = input.dim() > 1 and input.shape[1] >= MANY_CLASSES
        self.sought.seen |= many
        covered = (
            many
            and input.numel() >= self.least_logits
            and _is_plain(input)
            and _is_plain(target)
            and input.requires_grad
            and target.dtype == torch.int64
            and target.shape == input.shape[:1] + input.shape[2:]
            and weight is None
            and size_average is None
            and reduce is None
            and reduction in ("mean", "sum")
            and not label_smoothing
        )
        if not covered:
            return functional.cross_entropy(
                input,
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        if torch.is_autocast_enabled(input.device.type):
            input = input.float()
        # Classes last; of most language models that is how they were made, and copies nothing.
        input, target = input.movedim(1, -1).flatten(0, -2), target.flatten()
        kept = target != ignore_index
        total: Any = _CrossEntropy.apply(input, torch.where(kept, target, 0), kept)
        return total / kept.sum() if reduction == "mean" else total

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        attend = functools.partial(
            _attended, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
        )
        self.sought.seen |= query.shape[-2] >= LONG
        tensors = (query, key, value)
        scores = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
        if (
            scores < self.least_scores
            or query.shape[-2] < LONG
            or dropout_p
            or (attn_mask is not None and attn_mask.requires_grad)
            or not all(map(_is_plain, tensors))
            or not any(tensor.requires_grad for tensor in tensors)
            or torch.is_autocast_enabled(query.device.type)
        ):
            return attend(*tensors)
        attended: Any = _Attention.apply(attend, *tensors)
        return attended


def _attended(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention by torch, also where this mode is entered around a backward pass."""
    internals: Any = torch._C
    with internals.DisableTorchFunction():
        return functional.scaled_dot_product_attention(query, key, value, **options)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is no tensor of a transform, whose rules custom functions do not have."""
    internals: Any = torch._C
    return not internals._functorch.is_functorch_wrapped_tensor(tensor)


class _CrossEntropy(torch.autograd.Function):
    """sum_n logsumexp(z_n) - z_{n, y_n} over the rows that are kept; it keeps the logits z."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target, kept)
        normalizers = torch.cat([rows.logsumexp(1) for rows in logits.split(ROWS)])
        losses = normalizers - logits.gather(1, target[:, None])[:, 0]
        return torch.where(kept, losses, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Slope.apply(grad, *ctx.saved_tensors), None, None


class _Slope(torch.autograd.Function):
    """grad (p - y) by row, its gradient in the logits; it keeps these alone."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, logits: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(grad, logits, target, kept)
        slope = torch.softmax(logits, 1)
        slope.scatter_add_(1, target[:, None], slope.new_full((1, 1), -1.0).expand(len(target), 1))
        return slope.mul_(torch.where(kept, grad, 0.0)[:, None])

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> Any:  # type: ignore[override]
        grad, logits, target, kept = ctx.saved_tensors
        if not (torch.is_grad_enabled() or ctx.needs_input_grad[0]) and _is_plain(along):
            return None, _by_rows(torch.where(kept, grad, 0.0), logits, along), None, None
        p = torch.softmax(logits, 1)
        inner = (p * along).sum(1, keepdim=True)
        each = torch.where(kept, grad, 0.0)[:, None]
        of_logits = p * (along - inner) * each
        of_grad = None
        if ctx.needs_input_grad[0]:
            slopes = inner[:, 0] - along.gather(1, target[:, None])[:, 0]
            of_grad = torch.where(kept, slopes, 0.0).sum()
        return of_grad, of_logits, None, None


def _by_rows(each: Tensor, logits: Tensor, along: Tensor) -> Tensor:
    """p (u - <p, u>) times a number for each row: some rows at a time, which stay in the cache."""
    result = torch.empty_like(along)
    for some in range(0, len(logits), ROWS):
        rows = slice(some, some + ROWS)
        p, part = torch.softmax(logits[rows], 1), result[rows]
        torch.mul(p, along[rows], out=part)
        inner = part.sum(1, keepdim=True)
        part.sub_(p.mul_(inner)).mul_(each[rows, None])
    return result


class _Attention(torch.autograd.Function):
    """Attention that keeps query, key and value, and forms the rest again for each derivative."""

    @staticmethod
    def forward(
        ctx: Any, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        ctx.attend = attend
        ctx.save_for_backward(query, key, value)
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, *_AttentionSlope.apply(ctx.attend, grad, *ctx.saved_tensors)  # type: ignore[misc]


class _AttentionSlope(torch.autograd.Function):
    """The gradient of attention in query, key and value along `grad`; it keeps these four."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Tensor],
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.attend = attend
        ctx.save_for_backward(grad, query, key, value)
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            return torch.autograd.grad(attend(*inputs), inputs, grad)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:  # type: ignore[override]
        again = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        with torch.enable_grad():
            # Where a further derivative is wanted it goes through all that is done here.
            leaves = [
                tensor.view_as(tensor) if again and tensor.requires_grad else _leaf(tensor)
                for tensor in saved
            ]
            grad, *inputs = leaves
            slopes = torch.autograd.grad(ctx.attend(*inputs), inputs, grad, create_graph=True)
            parts = torch.autograd.grad(
                slopes, leaves, along, create_graph=again, allow_unused=True
            )
        return None, *parts


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
