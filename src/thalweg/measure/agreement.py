"""Do all processes of a group make a report, or none? One that fails must not leave others waiting.

Processes that share the samples of a loss close every sum together. What fails in the evaluation of
a process's own samples all hear of by the sum itself, see `loss/reduce.py`. A report can fail
elsewhere too, such as in a probe of the user's, and the training goes on afterwards. So while a
report is made a number goes ahead of each sum: how many have failed.

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
    thalweg.loss.reduce.ProcessFailed: another process has failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from thalweg.loss.reduce import ProcessFailed, Reduction, reduction_in
from thalweg.sharding import sharding_of


@contextmanager
def all_or_none(loss: Any) -> Iterator[None]:
    """Fail in every process where the block fails in one, with the same error.

    All processes must enter it, and within it close the same sums, by the `reduction` of the loss.
    In one process it does nothing. Not heard of: an interrupt, and sums that a loss of another
    class closes by itself.

    Args:
        loss: one with a `reduction`, such as an `Objective`; others are taken for one process.

    Raises:
        Exception: of the block in this process, or in another: see `Reduction.settle`.
    """
    reduction = reduction_in(loss)
    if type(reduction) is Reduction:
        yield
        return
    loss.reduction = agreeing = _Agreeing(reduction)
    # Of a model in shards: the exchanges of parts, which linear algebra makes.
    sharding, failure = sharding_of(loss), None
    around = None if sharding is None else sharding.around_each
    if sharding is not None and around is not None:
        sharding.around_each = agreeing.around(around)
    try:
        yield
    except Exception as error:
        if getattr(error, "of_all", False):
            raise
        failure = error
    finally:
        loss.reduction = reduction
        if sharding is not None and around is not None:
            sharding.around_each = around
    # None has failed behind the last sum either.
    agreeing.agree(failure)


class _Agreeing(Reduction):
    """Closes sums as another one does, after all have said that they come to it."""

    def __init__(self, inner: Reduction) -> None:
        self.inner = inner
        self.rank = inner.rank

    def agree(self, failure: Exception | None = None) -> None:
        """Say whether this process has failed; where any has, all raise."""
        if self.inner.anywhere(failure is not None):
            self.inner.settle(failure)
            unknown = ProcessFailed("another process has failed")
            unknown.of_all = True
            raise unknown

    def around(
        self, inner: Callable[[], AbstractContextManager[object]]
    ) -> Callable[[], AbstractContextManager[object]]:
        """What is entered around an exchange, after all have said that they come to it."""

        def entered() -> AbstractContextManager[object]:
            self.agree()
            return inner()

        return entered

    def sum(self, partial: Tensor) -> Tensor:
        self.agree()
        return self.inner.sum(partial)

    def close(self, partial: Tensor) -> Tensor:
        self.agree()
        return self.inner.close(partial)

    def total(self, partial: float) -> float:
        self.agree()
        return self.inner.total(partial)

    def anywhere(self, here: bool) -> bool:
        self.agree()
        return self.inner.anywhere(here)

    def place(self, count: int) -> tuple[int, int]:
        self.agree()
        return self.inner.place(count)

    def gathered(self, text: str) -> list[str]:
        self.agree()
        return self.inner.gathered(text)

    def sums(self, compute: Callable[[], tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, ...]:
        self.agree()
        return self.inner.sums(compute, like)

    def total_of(self, compute: Callable[[], float]) -> float:
        self.agree()
        return self.inner.total_of(compute)

    def settle(self, failure: Exception | None) -> None:
        self.agree()
        self.inner.settle(failure)
