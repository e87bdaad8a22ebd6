"""Local SGD with all workers in one process: K copies of the parameters and optimizer states.

The same numbers as `LocalSGD` in K processes under `torch.distributed`: bit for bit for two
workers, to rounding beyond, where the order in which processes add up is their own. For models
without randomness, that is: dropout draws from one generator here, from one in each process there.

Source: Gu, Lyu, Huang, Arora 2023 (arXiv 2303.01215).

Example:
    >>> import torch
    >>> from thalweg.contrib.averaging_period import ConstantPeriod
    >>> weight, targets = torch.nn.Parameter(torch.zeros(1)), [1.0, 3.0]
    >>> optimizers = [torch.optim.SGD([weight], lr=0.5) for _ in targets]
    >>> workers = SimulatedWorkers(optimizers, ConstantPeriod(2))
    >>> def closure(worker):
    ...     workers.zero_grad()
    ...     loss = (weight - targets[worker]).square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> losses = workers.step(closure)
    >>> losses = workers.step(closure)
    >>> weight.item()
    1.5
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.contrib.averaging_period import AveragingPeriod, Rounds
from thalweg.errors import InvalidInput, invalid
from thalweg.optim.copying import state_snapshot, undone_on_failure
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.wrapping import needs_closure, require_optimizer

#: Key of what a state_dict has beyond that of the first worker's optimizer.
WORKERS = "workers"


class SimulatedWorkers(Wrapper):
    """Local SGD of K workers over the parameters of one model, as one `torch.optim.Optimizer`.

    Between two steps the model holds the mean of the workers' parameters, so that it can be
    evaluated at any time; at the end of a round each worker is there. Where those parameters are
    moved between two steps, as by `SplitUpdate` around this, the workers move along. Buffers of the
    model are shared by all workers.

    Args:
        optimizers: one for each worker, built alike over the same parameters. Settings, such as the
            learning rate, are those of the first: change them in `param_groups` of this object.
        schedule: `ConstantPeriod(H)` or `QuadraticRule(alpha, minimum)`.
        total_steps: of the training, at whose end the last round ends too; None: not known.

    Attributes:
        optimizers: as given.
        rounds: the counters: steps, H of the round, steps done in it.
        needs_closure: True.

    Raises:
        InvalidInput: no optimizer; optimizers over different parameters; no total_steps with
            `QuadraticRule`.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        schedule: AveragingPeriod,
        total_steps: int | None = None,
    ) -> None:
        if not optimizers:
            raise invalid("optimizers", [], "at least one optimizer")
        for optimizer in optimizers:
            require_optimizer("optimizers", optimizer)
        self.optimizers: tuple[Optimizer, ...] = tuple(optimizers)
        places = [[id(p) for p in _parameters(optimizer)] for optimizer in self.optimizers]
        if any(place != places[0] for place in places):
            raise InvalidInput(
                "SimulatedWorkers: the optimizers are over different parameters; build each over"
                " those of one model, in one order"
            )
        self.rounds = Rounds(schedule, total_steps)
        # theta of each worker, and their mean as it was written into the model; none before the
        # first step, where all are at the model's parameters.
        self._thetas: list[list[Tensor]] = []
        self._mean: list[Tensor] = []
        super().__init__(self.optimizers[0])

    @property
    def needs_closure(self) -> bool:
        """True."""
        return True

    @property
    def optimizer(self) -> Optimizer:
        """The first worker's, which stands for all of them."""
        return self.optimizers[0]

    @torch.no_grad()
    def step(self, closure: Callable[[int], Any] | None = None) -> list[Any]:  # type: ignore[override]
        """Make one local step of every worker, one after another; average where a round ends.

        Args:
            closure: takes the number of a worker, from 0; clears the gradients, computes the loss
                of that worker's mini-batch at the model's parameters and calls `backward`. Called
                once for each worker, and again where its optimizer needs a closure.

        Returns:
            What `closure` returned for each worker, at its first call.

        Raises:
            InvalidInput: no closure.
        """
        if closure is None:
            raise InvalidInput(
                "SimulatedWorkers.step: no closure; give a function that takes the number of a"
                " worker, computes its loss and calls backward"
            )
        with undone_on_failure(self):
            return self._steps(closure, self._parameters())

    def _steps(self, closure: Callable[[int], Any], own: list[Tensor]) -> list[Any]:
        self.rounds.begin_step(float(self.param_groups[0]["lr"]))
        self._take_over_settings()
        self._move_along(own)
        losses = []
        for worker, (optimizer, theta) in enumerate(
            zip(self.optimizers, self._thetas, strict=True)
        ):
            _copy(own, theta)
            losses.append(_local_step(optimizer, partial(closure, worker)))
            _copy(theta, own)
        _copy(own, [_mean(copies) for copies in zip(*self._thetas, strict=True)])
        self._mean = [p.clone() for p in own]
        if self.rounds.end_step():
            for theta in self._thetas:
                _copy(theta, own)
        return losses

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer of every worker; they begin at the present values."""
        known = {id(p) for p in self._parameters()}
        listed = param_group["params"]
        listed = [listed] if isinstance(listed, Tensor) else list(listed)
        for optimizer in self.optimizers:
            optimizer.add_param_group({**param_group, "params": list(listed)})
        added = [p.detach() for p in self._parameters() if id(p) not in known]
        if self._mean:
            self._mean += [p.clone() for p in added]
            for theta in self._thetas:
                theta += [p.clone() for p in added]

    def state_snapshot(self) -> Callable[[], None]:
        """Copy the states and parameters of all workers; returns a way back."""
        undo = [state_snapshot(optimizer) for optimizer in self.optimizers]
        thetas = [[p.clone() for p in theta] for theta in self._thetas]
        mean, rounds = self._mean, self.rounds.state_dict()

        def all_of_them() -> None:
            for each in undo:
                each()
            self._thetas, self._mean = thetas, mean
            self.rounds.load_state_dict(rounds)

        return all_of_them

    def _saved(self) -> dict[str, Any]:
        """The state of the first worker's optimizer, and under "workers" the rest.

        The rest: the other optimizers' states, every worker's parameters, and the counters.
        """
        own = {
            "states": [other.state_dict()["state"] for other in self.optimizers[1:]],
            "thetas": [list(theta) for theta in self._thetas],
            "mean": list(self._mean),
            "rounds": self.rounds.state_dict(),
        }
        return {**self.optimizer.state_dict(), WORKERS: own}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        That of a bare optimizer begins a first round at the model's parameters, with that state for
        every worker.

        Raises:
            InvalidInput: it is of another number of workers.
        """
        own = state_dict.get(WORKERS)
        first = {key: value for key, value in state_dict.items() if key != WORKERS}
        others = [first["state"]] * (len(self.optimizers) - 1) if own is None else own["states"]
        if len(others) != len(self.optimizers) - 1:
            raise invalid(
                "state_dict", f"{len(others) + 1} workers", f"{len(self.optimizers)} workers"
            )
        for optimizer, state in zip(self.optimizers, (first["state"], *others), strict=True):
            # A copy each: optimizers continue in the very tensors that they are given.
            optimizer.load_state_dict({**first, "state": copy.deepcopy(state)})
        self._thetas = [] if own is None else copy.deepcopy(own["thetas"])
        self._mean = [] if own is None else copy.deepcopy(own["mean"])
        self.rounds.load_state_dict(None if own is None else own["rounds"])

    def _inner_optimizers(self) -> Sequence[Optimizer]:
        return self.optimizers

    def _move_along(self, own: list[Tensor]) -> None:
        """Begin the step at the model's parameters, or where the workers are, relative to them."""
        if not self._mean:
            self._thetas = [[p.clone() for p in own] for _ in self.optimizers]
            return
        for number, (p, mean) in enumerate(zip(own, self._mean, strict=True)):
            if torch.equal(p, mean):
                continue
            for theta in self._thetas:
                if self.rounds.done:
                    theta[number].add_(p - mean)
                else:
                    theta[number].copy_(p)

    def _take_over_settings(self) -> None:
        for other in self.optimizers[1:]:
            for group, first in zip(other.param_groups, self.param_groups, strict=True):
                group.update({key: value for key, value in first.items() if key != "params"})


def _local_step(optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        loss = closure()
    # With a closure, other optimizers would evaluate the loss again in vain.
    if needs_closure(optimizer):
        optimizer.step(closure)
    else:
        optimizer.step()
    return loss


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def _mean(copies: Sequence[Tensor]) -> Tensor:
    """Summed in the order of the workers, halves in float32, as `LocalSGD.average` does."""
    half = copies[0].dtype in (torch.float16, torch.bfloat16)
    total = copies[0].float() if half else copies[0].clone()
    for other in copies[1:]:
        total = total + other
    return total / len(copies)
