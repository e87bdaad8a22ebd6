"""What does the next step of a run depend on? Its whole state: built, saved and restored.

Tensors of a checkpoint come back where they were: parameters and bases on the device, counters and
the states of random generators on the CPU, where PyTorch wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.contrib.simulated_workers import WORKERS
from thalweg.lab.config import TRUNK, Spec
from thalweg.lab.store import durable
from thalweg.lab.store.belonging import Mark
from thalweg.lab.store.checkpoint import (
    Checkpoint,
    checkpoint_path,
    save_checkpoint,
)
from thalweg.lab.store.packing import pack_state, unpack_state
from thalweg.lab.store.tensors import save_tensors
from thalweg.lab.training.building import (
    Setup,
    build_setup,
    can_carry_state,
    make_optimizer,
    make_source,
)
from thalweg.lab.training.progression import Progression
from thalweg.lab.training.recording import Recorder
from thalweg.measure.step_state import BranchPoint
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.source import SubspaceSource
from thalweg.tracking.threshold_source import ThresholdSource
from thalweg.tracking.tracker import SubspaceTracker

if TYPE_CHECKING:
    from thalweg.lab.config.optimizers import OptimizerSettings


LOCKSTEP = "lockstep"
"""Key of a source's state that is one of many runs in lockstep: no tracker of one run reads it."""


class RunState:
    """Everything that the next step of a run depends on.

    Args:
        spec: of the run's branch, `Spec.of_branch`.
        seed: which seed.
        branch: name of the branch, or "trunk".
        device: where to compute, such as "cpu" or "cuda:1".
        request: a file that asks to end the current phase by hand.
        say: takes one line on what happens to phases and optimizers.

    Attributes:
        setup: the problem with its model, the full training loss, k.
        progression: phase and step.
        recorder: the probes, and what the subspace has cost since the last row.
        source: gives S_k.
        branch_point: theta and S_k where the run began; None in the trunk, and where nothing asks.
        lockstep: of a run that was restored, what its lockstep has saved of it; None of one that
            went by itself.

    Raises:
        InvalidInput: the problem cannot be built.
        IntegrityError: a file is damaged.
    """

    def __init__(
        self,
        spec: Spec,
        seed: int,
        branch: str,
        device: str,
        request: Path,
        say: Callable[[str], None],
    ) -> None:
        self.spec = spec
        self.seed = seed
        self.setup: Setup = build_setup(spec, seed, device)
        self.progression = Progression(
            spec.phases if branch == TRUNK else (spec.branch_phase(branch),),
            self.setup.problem.num_samples,
            request,
            say,
        )
        self.recorder = Recorder(spec.probes)
        self.source: SubspaceSource = make_source(spec, self.setup, seed)
        self.branch_point: BranchPoint | None = None
        self.lockstep: Mapping[str, Any] | None = None
        self._say = say
        self._optimizer: Optimizer | None = None
        self._phase_of_optimizer = -1

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the current phase, built when the phase begins.

        The same kind of optimizer continues with its momentum, under the new phase's settings.
        """
        number = self.progression.position.phase
        if self._optimizer is None or self._phase_of_optimizer != number:
            before = self._optimizer
            phase_before = self.progression.phases[self._phase_of_optimizer]
            point = self.branch_point
            self._optimizer = make_optimizer(
                self.spec,
                self.progression.phase,
                self.setup,
                self.seed,
                self.source,
                None if point is None else point.subspace,
            )
            self._phase_of_optimizer = number
            if before is not None:
                self.carry_optimizer_state(before.state_dict(), phase_before.optimizer)
        return self._optimizer

    def carry_optimizer_state(self, state: dict[str, Any], settings: OptimizerSettings) -> None:
        """Continue with the state of an optimizer of these settings, if it is of the same kind."""
        if can_carry_state(settings, self.progression.phase.optimizer):
            groups = self.optimizer.state_dict()["param_groups"]
            # Workers begin together, at the mean of those before, each with the first one's state.
            one = {key: value for key, value in state.items() if key != WORKERS}
            self.optimizer.load_state_dict({**one, "param_groups": groups})
        elif state["state"]:
            self._say("another kind of optimizer: it begins without the state of the last")

    @property
    def _split_source(self) -> SubspaceSource | None:
        """What the split alone follows, in the optimizer's metric or cheaply; None elsewhere."""
        source = getattr(self.optimizer, "source", None)
        own = (OptimizerMetricSource, ThresholdSource, UpdateSubspace, GradientSubspace)
        return source if isinstance(source, own) and source is not self.source else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors in any nesting, for `save_state`."""
        model = self.setup.problem.model
        return {
            "progression": self.progression.state_dict(),
            "parameters": {name: tensor.detach() for name, tensor in model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "split_source": self._split_source.state_dict() if self._split_source else {},
            "branch_point": _branch_point_state(self.branch_point),
            "recorder": self.recorder.state_dict(),
            "random": random_state(self.setup.objective.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.progression.load_state_dict(state["progression"])
        self.branch_point = _restored_branch_point(state["branch_point"])
        self.lockstep = state["source"].get(LOCKSTEP)
        if self.lockstep is None:
            self.source.load_state_dict(state["source"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._split_source is not None:
            self._split_source.load_state_dict(state["split_source"])
        self.recorder.load_state_dict(state["recorder"])
        self.load_model_and_random(state)

    def load_model_and_random(self, state: Mapping[str, Any]) -> None:
        """Restore the model's parameters and buffers, and the random generators, alone."""
        self.setup.problem.model.load_state_dict(state["parameters"])
        restore_random_state(state["random"], self.setup.objective.device)


# Into a checkpoint, and back.


def save_state(
    folder: Path, step: int, state: dict[str, Any], *, keep: int, permanent: bool, mark: Mark
) -> None:
    """Save a nested state of plain values and tensors as the checkpoint of `step`."""
    tensors, packed = pack_state(state)
    on_device = [name for name, tensor in tensors.items() if tensor.device.type != "cpu"]
    content = {"state": packed, "on_device": on_device}
    save_checkpoint(folder, step, tensors, content, keep=keep, permanent=permanent, mark=mark)


def restored_state(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """The state that was saved, its tensors where they were.

    A checkpoint of a run on a CPU that continues elsewhere has its floating-point tensors moved;
    the numbers then differ in their last bits from those of an undisturbed run.
    """
    content = checkpoint.state
    tensors = dict(checkpoint.tensors)
    if device.type != "cpu":
        moved = content["on_device"] or [n for n, t in tensors.items() if t.is_floating_point()]
        tensors.update({name: tensors[name].to(device) for name in moved})
    return unpack_state(tensors, content["state"])


def save_basis(folder: Path, step: int, subspace: Subspace) -> Path:
    """Save S_k of one step for good as `step-00001000.safetensors`.

    It holds `basis` (P, k), `eigenvalues` (k,), and `residuals` (k,) where known.
    """
    tensors = {"basis": subspace.basis, "eigenvalues": subspace.eigenvalues}
    if subspace.residuals is not None:
        tensors["residuals"] = subspace.residuals
    durable.make_folder(folder)
    target = folder / f"{checkpoint_path(folder, step).name}.safetensors"
    building = target.with_name(durable.UNFINISHED + target.name)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with durable.storage_errors(folder, needed, target):
        try:
            save_tensors(building, tensors)
            durable.rename(building, target)
        except BaseException:
            building.unlink(missing_ok=True)
            raise
    return target


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a model on this device draws from (dropout): on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` gave; the state of a device that is not used is left out."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())


# Where branches start.


def found_for_branches(spec: Spec, branch: str, setup: Setup, seed: int) -> dict[str, Any]:
    """A tracker's state at the end of a run, for those that start there; empty where none asks.

    So S_k is found once there, to the last bit as each branch would find it for itself; a branch
    with a subspace of its own finds that one.

    Args:
        spec: of the whole study.
        branch: the run that ends, at the model's parameters.
    """
    if not spec.hands_over_branch_point(branch):
        return {}
    own = spec.of_branch(branch)
    source = make_source(own, setup, seed)
    # What is followed alone: the Hessian of a mini-batch is another one for each branch.
    if not isinstance(source, SubspaceTracker):
        return {}
    source.update(setup.objective.theta())
    return {"by": _subspace_settings(own), "source": source.state_dict()}


def at_branch_point(
    found: Mapping[str, Any], spec: Spec, source: SubspaceSource, theta: Tensor
) -> BranchPoint:
    """The branch point at theta (P,), with S_k as found there, or else found now.

    Args:
        found: what `found_for_branches` gave.
        spec: as the branch computes with it.
        source: of the branch; it continues from there.
    """
    if found and found["by"] == _subspace_settings(spec):
        source.load_state_dict(found["source"])
        return BranchPoint(theta, source.subspace)
    return BranchPoint(theta, source.update(theta))


def _subspace_settings(spec: Spec) -> dict[str, Any]:
    return spec.subspace.model_dump(mode="json")


def _branch_point_state(point: BranchPoint | None) -> dict[str, Any] | None:
    """A branch point as tensors; the basis as rows, so that its layout survives."""
    if point is None:
        return None
    space = point.subspace
    return {"theta": point.theta, "rows": space.basis.T, "eigenvalues": space.eigenvalues}


def _restored_branch_point(state: dict[str, Any] | None) -> BranchPoint | None:
    if state is None:
        return None
    return BranchPoint(state["theta"], Subspace(state["rows"].T, state["eigenvalues"]))
