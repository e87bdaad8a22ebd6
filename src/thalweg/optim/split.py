"""Scale the dominant and the bulk part of the update that any optimizer proposes.

The wrapped optimizer makes its step from theta to theta'; its own state (momentum, second moments)
sees the gradients as they are. The update delta = theta' - theta is then split at theta and put
back as a P_k delta + b (I - P_k) delta. Dom-X is (a, b) = (1, 0), Bulk-X is (0, 1).

Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), section 4; for any optimizer: section 6.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.tracking.tracker import SubspaceTracker
    >>> inputs, targets = torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2)
    >>> model, data = torch.nn.Linear(3, 2), (inputs, targets)
    >>> loss = torch.nn.MSELoss()
    >>> tracker = SubspaceTracker(Objective(model, loss, data), k=2)
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = SplitUpdate(base, tracker, dominant=0.0, bulk=1.0)
    >>> loss(model(data[0]), data[1]).backward()
    >>> optimizer.step()
    >>> optimizer.split.bulk.shape
    torch.Size([8])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.errors import InvalidInput
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.source import Split, SubspaceSource


class SplitUpdate(Wrapper):
    """Wraps an optimizer and scales the two parts of each update it proposes.

    `state_dict` is that of the wrapped optimizer; the state of the source is saved apart.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built.
        source: gives the subspace at the point before the step: a `SubspaceTracker`, a
            `FixedSubspace`, or anything with `update` and `split`.
        dominant: a, the factor on the part in S_k.
        bulk: b, the factor on the rest. (1, 1) leaves the optimizer alone, bit for bit, and never
            asks for the subspace.
        parameters: the parameters that make up theta, in the order of the source; default: those of
            the source's objective, or all of the optimizer's. The optimizer's other parameters
            take its whole update.

    Attributes:
        proposed: delta of the last step before scaling, (P,).
        split: the parts of it, None after a (1, 1) step.
        source_is_here: whether the source has been moved on to the present point already, by a rule
            or a probe that asked before the step; set it for the next step, which forgets it.

    Raises:
        InvalidInput: the optimizer updates none of the parameters of theta.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: SubspaceSource,
        dominant: float = 1.0,
        bulk: float = 1.0,
        *,
        parameters: list[nn.Parameter] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.source = source
        self.dominant = dominant
        self.bulk = bulk
        super().__init__(optimizer)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        objective = getattr(source, "objective", None)
        if parameters is None and objective is not None:
            parameters = list(objective.parameters())
        self.parameters: list[nn.Parameter] = own if parameters is None else parameters
        if not {id(p) for p in self.parameters} & {id(p) for p in own}:
            raise InvalidInput(
                "SplitUpdate: the optimizer updates none of the parameters of the subspace; build"
                " both from one model"
            )
        theta = {id(p) for p in self.parameters}
        self._others: list[nn.Parameter] = [p for p in own if id(p) not in theta]
        self.proposed: Tensor | None = None
        self.split: Split | None = None
        self.source_is_here = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; returns the loss of `closure`, if one is given."""
        is_here, self.source_is_here = self.source_is_here, False
        before = self._flat()
        others_before = [p.clone() for p in self._others]
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        self.proposed = self._flat() - before
        self.split = None
        if (self.dominant, self.bulk) != (1.0, 1.0):
            others_after = [p.clone() for p in self._others]
            # The subspace is that of the point before the step in all parameters.
            self._copy(others_before)
            try:
                if not is_here:
                    self.source.update(before, self.proposed)
                self.split = self.source.split(self.proposed)
            finally:
                self._copy(others_after)
            self._write(before + self.dominant * self.split.dominant + self.bulk * self.split.bulk)
        return loss

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._others, values, strict=True):
            parameter.copy_(value)

    def _write(self, theta: Tensor) -> None:
        parts = theta.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.reshape(parameter.shape))
