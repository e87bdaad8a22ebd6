"""How does the whole state of a run get into a checkpoint, and back onto its device?

Tensors come back where they were: parameters and bases on the device, counters and the states of
random generators on the CPU, where PyTorch wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thalweg.lab.store import durable
from thalweg.lab.store.checkpoint import (
    Checkpoint,
    checkpoint_path,
    pack_state,
    save_checkpoint,
    unpack_state,
)
from thalweg.lab.store.tensors import save_tensors
from thalweg.measure.step_state import BranchPoint
from thalweg.spectrum.subspace import Subspace


def save_state(
    folder: Path, step: int, state: dict[str, Any], *, keep: int, permanent: bool
) -> None:
    """Save a nested state of plain values and tensors as the checkpoint of `step`."""
    tensors, packed = pack_state(state)
    on_device = [name for name, tensor in tensors.items() if tensor.device.type != "cpu"]
    content = {"state": packed, "on_device": on_device}
    save_checkpoint(folder, step, tensors, content, keep=keep, permanent=permanent)


def restored_state(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """The state that was saved, its tensors where they were.

    A checkpoint of a run on a CPU that goes on elsewhere has its floating-point tensors moved; the
    numbers then differ in their last bits from those of an undisturbed run.
    """
    content = checkpoint.state
    tensors = dict(checkpoint.tensors)
    if device.type != "cpu":
        moved = content["on_device"] or [n for n, t in tensors.items() if t.is_floating_point()]
        tensors.update({name: tensors[name].to(device) for name in moved})
    return unpack_state(tensors, content["state"])


def branch_point_state(point: BranchPoint | None) -> dict[str, Any] | None:
    """A branch point as tensors; the basis as rows, so that its layout survives."""
    if point is None:
        return None
    space = point.subspace
    return {"theta": point.theta, "rows": space.basis.T, "eigenvalues": space.eigenvalues}


def restored_branch_point(state: dict[str, Any] | None) -> BranchPoint | None:
    """What `branch_point_state` was given."""
    if state is None:
        return None
    return BranchPoint(state["theta"], Subspace(state["rows"].T, state["eigenvalues"]))


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
    with durable.storage_errors(folder, needed):
        try:
            save_tensors(building, tensors)
            durable.rename(building, target)
        except BaseException:
            building.unlink(missing_ok=True)
            raise
    return target
