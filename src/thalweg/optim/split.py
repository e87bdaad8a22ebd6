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

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.layout import flat
from thalweg.loss.shards import sharding_of_parameters, write_part
from thalweg.optim.copying import undone_on_failure
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.source import Split, SubspaceSource


class SplitUpdate(Wrapper):
    """Wraps an optimizer and scales the two parts of each update it proposes.

    `state_dict` is that of the wrapped optimizer; the state of the source is saved apart. A step
    that fails, such as on a watched loss that is NaN, leaves the parameters and the wrapped
    optimizer's state as they were (not the source, which may have moved on, nor gradients): for
    that the state is copied for the time of a step, 2 P numbers around Adam, none around SGD.

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
        super().__init__(optimizer)
        self.optimizer = optimizer
        self.source = source
        self.dominant = dominant
        self.bulk = bulk
        objective = getattr(source, "objective", None)
        # Then it cannot grow: the subspace has its length.
        self._theta_is_all = parameters is None and objective is None
        if parameters is None:
            own: Any = self._parameters() if objective is None else objective.parameters()
            parameters = list(own)
        self.parameters: list[nn.Parameter] = parameters
        self._sharding = sharding_of_parameters(parameters)
        if not {id(p) for p in self.parameters} & {id(p) for p in self._parameters()}:
            raise InvalidInput(
                "SplitUpdate: the optimizer updates none of the parameters of the subspace; build"
                " both from one model"
            )
        self.proposed: Tensor | None = None
        self.split: Split | None = None
        self.source_is_here = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; returns the loss of `closure`, if one is given.

        Raises:
            InvalidInput: the optimizer was given parameters that the subspace knows nothing of.
            Diverged: by the source; whatever is raised, nothing has moved.
        """
        others = self._others()
        is_here, self.source_is_here = self.source_is_here, False
        self.proposed = self.split = None
        before = self._flat()
        if (self.dominant, self.bulk) == (1.0, 1.0):
            with undone_on_failure(self):
                loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            self.proposed = self._flat() - before
            return loss
        others_before = [p.clone() for p in others]
        undo = self.state_snapshot()
        try:
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            self.proposed = self._flat() - before
            others_after = [p.clone() for p in others]
            # The subspace is that of the point before the step in all parameters.
            _copy(others, others_before)
            if not is_here:
                self.source.update(before, self.proposed)
            self.split = self.source.split(self.proposed)
            moved = before + self.dominant * self.split.dominant + self.bulk * self.split.bulk
        except BaseException:
            self._write(before)
            _copy(others, others_before)
            undo()
            raise
        _copy(others, others_after)
        self._write(moved)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer: of theta it is split, elsewhere it moves whole.

        Raises:
            InvalidInput: it holds parameters that the model of the source's loss does not have, or
                theta is all of the optimizer's parameters, which the subspace was made for.
        """
        given = param_group.get("params", ())
        listed = [given] if isinstance(given, Tensor) else list(given)
        own = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
        known = {id(p) for p in self.parameters}
        model = getattr(getattr(self.source, "objective", None), "model", None)
        if isinstance(model, nn.Module):
            known |= {id(p) for p in model.parameters()}
        unknown = [tuple(p.shape) for p in own if id(p) not in known]
        if unknown and (self._theta_is_all or model is not None):
            raise invalid(
                "SplitUpdate.add_param_group",
                f"a parameter of shape {unknown[0]}",
                "parameters of the model whose loss gives the subspace",
                "build a source for the larger model, and SplitUpdate anew around the optimizer",
            )
        super().add_param_group({**param_group, "params": listed})

    def _others(self) -> list[Tensor]:
        """The optimizer's parameters outside of theta, also those that it was given since."""
        theta = {id(p) for p in self.parameters}
        others = [p for p in self._parameters() if id(p) not in theta]
        if others and self._theta_is_all:
            raise InvalidInput(
                f"SplitUpdate: the optimizer was given a parameter of shape"
                f" {tuple(others[0].shape)} that the subspace knows nothing of; build both anew, or"
                " name those of the subspace by parameters="
            )
        return others

    def _flat(self) -> Tensor:
        return flat([p.detach() for p in self.parameters], self._sharding)

    def _write(self, theta: Tensor) -> None:
        if self._sharding is not None:
            write_part(self._sharding, self.parameters, theta)
            return
        parts = theta.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.reshape(parameter.shape))


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(into, values, strict=True):
        parameter.copy_(value)
