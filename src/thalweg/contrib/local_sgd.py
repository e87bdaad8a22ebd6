"""Local SGD: workers that each make H steps of their own, then average their parameters.

    theta_w <- step(theta_w, g_w)                    H times, each worker w by itself
    theta_w <- (theta_1 + ... + theta_K) / K         all workers

H = 1 with plain SGD is synchronous SGD with the mean of the workers' gradients. With a small
learning rate and long training, larger H has a stronger drift towards flat minima.

Source: Gu, Lyu, Huang, Arora 2023 (arXiv 2303.01215); H that grows as the learning rate falls:
`QuadraticRule`, Gu et al. 2024 (2310.14423). As in their public code, an optimizer's own state
(momentum, second moments) is neither averaged nor reset, and the statistics of batch norm stay each
worker's own: re-estimate them before evaluating, as by `torch.optim.swa_utils.update_bn`. Unlike
there, training can continue exactly from a checkpoint between two averages.

In every process of a `torch.distributed` group, such as `torchrun` starts:

    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1), ConstantPeriod(8))

All workers in one process, for experiments and tests: `SimulatedWorkers`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from thalweg.contrib.averaging_period import AveragingPeriod, Rounds
from thalweg.errors import InvalidInput
from thalweg.optim.copying import undone_on_failure
from thalweg.optim.wrapper import Wrapper

#: Key of the counters in a state_dict, beside those of the wrapped optimizer.
COUNTERS = "rounds"


class LocalSGD(Wrapper):
    """Wraps the optimizer of one worker; averages the parameters of all at the end of each round.

    Every worker must make the same number of steps at the same learning rates, from the same
    parameters: the first step compares them. Goes around other wrappers (`SplitUpdate`, `SAM`), so
    that what they do is part of the local step; then `step` may need a closure, as theirs does.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built.
        schedule: `ConstantPeriod(H)` or `QuadraticRule(alpha, minimum)`; the learning rate is that
            of the first parameter group.
        total_steps: of the training, at whose end the last round ends too, however short; None: not
            known, then call `average` after the last step.
        group: the process group of the workers, that of all processes by default.

    Attributes:
        optimizer, group: as given.
        rounds: the counters: steps, H of the round, steps done in it.

    Raises:
        InvalidInput: `torch.distributed` is not initialized; no total_steps with `QuadraticRule`.

    `state_dict` has the counters beside the wrapped optimizer's state; one of a bare optimizer
    begins a first round. A copy averages over the same group of processes.
    """

    kept_in_copies = frozenset({"group"})

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: AveragingPeriod,
        total_steps: int | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidInput(
                "LocalSGD: torch.distributed is not initialized; call"
                " torch.distributed.init_process_group first, or hold all workers in one process"
                " with SimulatedWorkers"
            )
        super().__init__(optimizer)
        self.optimizer = optimizer
        self.group = group
        self.rounds = Rounds(schedule, total_steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make a local step, and average where it ends a round; returns the loss of `closure`.

        Raises:
            InvalidInput: at the first step, in all workers: they begin at different parameters.
        """
        if self.rounds.steps == 0:
            self._require_same_start()
        with undone_on_failure(self):
            self.rounds.begin_step(float(self.param_groups[0]["lr"]))
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            if self.rounds.end_step():
                self.average()
        return loss

    @torch.no_grad()
    def average(self) -> None:
        """Set the parameters of every worker to the mean over all; all workers must call it.

        It ends the current round. Half-precision parameters are summed in float32.
        """
        workers = dist.get_world_size(self.group)
        means: list[tuple[list[Tensor], Tensor]] = []
        for tensors in alike(self._parameters()):
            flat = flattened(tensors)
            dist.all_reduce(flat, group=self.group)
            flat /= workers
            means.append((tensors, flat))
        # All of them or none, where a message fails.
        for tensors, flat in means:
            for tensor, part in zip(tensors, unflattened(flat, tensors), strict=True):
                tensor.copy_(part)
        self.rounds.done = 0

    def state_snapshot(self) -> Callable[[], None]:
        """Copy the wrapped optimizer's state and the counters; returns a way back."""
        undo, rounds = super().state_snapshot(), self.rounds.state_dict()

        def both() -> None:
            undo()
            self.rounds.load_state_dict(rounds)

        return both

    def _saved(self) -> dict[str, Any]:
        """With the counters under "rounds".

        Each worker has its own: save it with the worker's own parameters.
        """
        return {**super()._saved(), COUNTERS: self.rounds.state_dict()}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """That of a bare optimizer begins a first round."""
        wrapped = {key: value for key, value in state_dict.items() if key != COUNTERS}
        super()._load(wrapped)
        self.rounds.load_state_dict(state_dict.get(COUNTERS))

    def _require_same_start(self) -> None:
        """Compare with the first worker; all raise where one differs, so that none is left waiting.

        Parameters that differ would be averaged silently.
        """
        differs = False
        parts = [flattened(tensors) for tensors in alike(self._parameters())]
        for own in parts:
            first = own.clone()
            dist.broadcast(first, group=self.group, group_src=0)
            differs = differs or not torch.equal(own, first)
        if not parts:
            return
        anywhere = torch.tensor(int(differs), device=parts[0].device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.group)
        if int(anywhere):
            raise InvalidInput(
                "LocalSGD: the workers begin at different parameters; build the model from one"
                " seed, or load one state_dict in all of them"
            )


def alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors by device and dtype, in order: each list can be one flat vector."""
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor)
    return list(kinds.values())


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """One new vector of all values, in float32 at least: halves lose too much in a sum."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def unflattened(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat vector in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
