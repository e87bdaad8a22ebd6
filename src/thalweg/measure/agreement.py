"""Do all processes of a group make a report, or none? One that fails must not leave others waiting.

Processes that share the samples of a loss close every sum together. Where one of them fails between
two sums (out of memory, a NaN in its own samples), the others would wait for it in the next sum. So
while a report is made a number goes ahead of each sum: how many have failed.

Example:
    >>> from types import SimpleNamespace
    >>> from thalweg.loss.reduce import Reduction
    >>> class Two(Reduction):  # this process, and another that has failed
    ...     def total(self, partial):
    ...         return partial + 1.0
    >>> loss = SimpleNamespace(reduction=Two())
    >>> with all_or_none(loss):
    ...     loss.reduction.sum(None)
    Traceback (most recent call last):
    thalweg.measure.agreement.OthersFailed: another process could not make this report
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from thalweg.errors import ThalwegError
from thalweg.loss.reduce import Reduction


class OthersFailed(ThalwegError):
    """Another process of the group has failed, so this one skips as well."""


@contextmanager
def all_or_none(loss: Any) -> Iterator[None]:
    """Fail in every process where the block fails in one.

    All processes must enter it, and within it close the same sums, by the `reduction` of the loss.
    In one process it does nothing. Not heard of: an interrupt, and sums that a loss of another
    class closes by itself.

    Args:
        loss: one with a `reduction`, such as an `Objective`; others are taken for one process.

    Raises:
        OthersFailed: in the processes where the block did not fail.
    """
    reduction = getattr(loss, "reduction", None)
    if not isinstance(reduction, Reduction) or type(reduction) is Reduction:
        yield
        return
    loss.reduction = _Agreeing(reduction)
    try:
        yield
        # None has failed behind the last sum either.
        loss.reduction.agree()
    except OthersFailed:
        raise
    except Exception:
        reduction.total(1.0)
        raise
    finally:
        loss.reduction = reduction


class _Agreeing(Reduction):
    """Closes sums as another one does, after all have said that they come to it."""

    def __init__(self, inner: Reduction) -> None:
        self.inner = inner

    def agree(self) -> None:
        if self.inner.total(0.0) > 0:
            raise OthersFailed("another process could not make this report")

    def sum(self, partial: Tensor) -> Tensor:
        self.agree()
        return self.inner.sum(partial)

    def total(self, partial: float) -> float:
        self.agree()
        return self.inner.total(partial)

    def place(self, count: int) -> tuple[int, int]:
        return self.inner.place(count)
