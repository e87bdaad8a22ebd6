"""How is the whole state of a run saved, so that a resumed run continues bit for bit?

A checkpoint is a folder `step-00001000/` with `tensors.safetensors`, `state.json` and
`manifest.json` (size and SHA-256 of both). It is built under a temporary name, flushed and renamed:
it is there whole or not at all. No file format notices a flipped bit by itself, so every checkpoint
is checked against its manifest before use, and the newest one that passes wins.

Strides are restored too: the same numbers in another memory layout make sums in another order.

Example:
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_checkpoint(folder, 1000, {"theta": torch.zeros(3)}, {"phase": 0})
    ...     path = latest_checkpoint(folder)
    ...     print(path.name, load_checkpoint(path).state)
    step-00001000 {'phase': 0}
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import IntegrityError, InvalidInput, invalid
from thalweg.lab.store import durable
from thalweg.lab.store.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_REPLACED = durable.UNFINISHED + "replaced-"
_NAME = re.compile(r"step-(\d{8,})")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at `step`: tensors by name, on the CPU, and a JSON-able state."""

    step: int
    tensors: dict[str, Tensor]
    state: Any


def save_checkpoint(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Any,
    keep: int = 2,
    permanent: bool = False,
) -> Path:
    """Save a checkpoint and remove the oldest ones beyond `keep`.

    Args:
        folder: the run's `checkpoints/`, created if missing. Only who holds the run's lock may
            save.
        step: number of updates made.
        tensors: by name, any device. Tensors that share memory are saved once each. Their strides
            are kept if dense in any order of dimensions (column-major, channels-last).
        state: JSON-able as it is; `pack_state` makes any nested state so.
        keep: how many of the last checkpoints stay, permanent ones not counted; at least 1.
        permanent: never removed (branch points). Stays so if this step is saved again.

    Returns:
        The checkpoint's folder.

    Raises:
        InvalidInput: a bad argument, a tensor with gaps or overlaps, a read-only folder.
        ThalwegError: the disk is full. What was saved before is kept in both cases.
    """
    if step < 0:
        raise invalid("checkpoint: step", step, "an integer >= 0")
    if keep < 1:
        raise invalid("checkpoint: keep", keep, "an integer >= 1")
    folder = Path(folder)
    target = checkpoint_path(folder, step)
    text = _state_text(step, state)
    durable.make_folder(folder)
    needed = sum(t.numel() * t.element_size() for t in tensors.values()) + len(text)
    building = folder / f"{durable.UNFINISHED}{target.name}"
    with durable.storage_errors(folder, needed):
        _tidy(folder)
        if durable.free_bytes(folder) < needed:
            raise durable.disk_full(folder, needed)
        permanent = permanent or _is_permanent(target)
        try:
            building.mkdir()
            save_tensors(building / _TENSORS, tensors)
            durable.write_file(building / _STATE, text)
            durable.write_file(building / _MANIFEST, _manifest_text(building, step, permanent))
            _put_in_place(building, target)
        except BaseException:
            if building.exists():
                durable.remove(building)
            raise
        _remove_old(folder, keep)
    return target


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read one checkpoint after checking it against its manifest.

    The tensors are fresh CPU tensors with the saved dtypes, shapes and strides, in memory aligned
    as PyTorch aligns its own.

    Raises:
        InvalidInput: there is no such folder.
        IntegrityError: a file is missing or is not what was saved.
    """
    path = Path(path)
    if not path.is_dir():
        raise invalid("checkpoint", str(path), "a folder such as checkpoints/step-00001000")
    manifest = _verify(path)
    content = durable.read_json(path / _STATE)
    if not (isinstance(content, dict) and "state" in content):
        raise IntegrityError(f"{path / _STATE}: damaged, it holds no state")
    return Checkpoint(manifest["step"], load_tensors(path / _TENSORS), content["state"])


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the newest checkpoint that passes its check, or None if there never was one.

    Raises:
        IntegrityError: there are checkpoints, and all are damaged.
    """
    candidates = _candidates(Path(folder))
    for _, path in candidates:
        try:
            _verify(path)
        except IntegrityError as error:
            _logger.warning("%s; trying the one before", error)
        else:
            return path
    if candidates:
        names = ", ".join(path.name for _, path in candidates)
        raise IntegrityError(f"{folder}: all checkpoints are damaged: {names}; start the run anew")
    return None


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Return the checkpoints in a folder by rising step, unchecked."""
    folder = Path(folder)
    found = (
        [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    )
    return sorted(found, key=_step_of)


def checkpoint_path(folder: Path | str, step: int) -> Path:
    """Return where the checkpoint of `step` is, or would be: names sort by step."""
    return Path(folder) / f"step-{step:08d}"


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path), newest first; one set aside while being replaced comes after its new."""
    found = [(_step_of(path), path) for path in list_checkpoints(folder)]
    aside = [(_step_of(p), p) for p in folder.glob(f"{_REPLACED}step-*")] if folder.is_dir() else []
    return sorted(found + aside, key=lambda item: (-item[0], item[1].name.startswith(".")))


def _step_of(path: Path) -> int:
    match = _NAME.search(path.name)
    return int(match[1]) if match else -1


def _put_in_place(building: Path, target: Path) -> None:
    durable.sync_folder(building)
    aside = target.with_name(_REPLACED + target.name)
    if target.exists():  # a folder cannot be renamed over one that holds files
        durable.rename(target, aside)
    durable.rename(building, target)
    if aside.exists():
        durable.remove(aside)


def _tidy(folder: Path) -> None:
    """Finish or undo what a killed process left half done."""
    for aside in folder.glob(f"{_REPLACED}step-*"):
        target = aside.with_name(aside.name.removeprefix(_REPLACED))
        if not target.exists():
            durable.rename(aside, target)
    durable.remove_unfinished(folder)


def _remove_old(folder: Path, keep: int) -> None:
    passing = [path for path in list_checkpoints(folder) if not _is_permanent(path)]
    for path in passing[:-keep]:
        durable.remove(path)


def _is_permanent(path: Path) -> bool:
    try:
        return bool(_read_manifest(path)["permanent"])
    except IntegrityError:
        return False


def _manifest_text(folder: Path, step: int, permanent: bool) -> str:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (_TENSORS, _STATE)
    }
    manifest = {"format": 1, "step": step, "permanent": permanent, "files": files}
    return durable.to_json({**manifest, "sha256": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = durable.read_json(path / _MANIFEST)
    except OSError as error:
        raise IntegrityError(f"{path}: no readable {_MANIFEST} ({error.strerror})") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise IntegrityError(f"{path / _MANIFEST}: damaged")
    if not _has_all(manifest):
        raise IntegrityError(f"{path / _MANIFEST}: damaged, it does not say what was written")
    if manifest["step"] != _step_of(path):
        raise IntegrityError(f"{path}: belongs to step {manifest['step']}")
    return manifest


def _has_all(manifest: Mapping[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("step"), int)
        and isinstance(manifest.get("permanent"), bool)
        and isinstance(files, dict)
        and set(files) == {_TENSORS, _STATE}
    )


def _verify(path: Path) -> dict[str, Any]:
    """Return the manifest after comparing size and SHA-256 of every file with it."""
    manifest = _read_manifest(path)
    for name, wanted in manifest["files"].items():
        file = path / name
        try:
            found = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        except OSError as error:
            raise IntegrityError(f"{file}: cannot be read ({error.strerror})") from error
        if found != wanted:
            raise IntegrityError(f"{file}: damaged, its SHA-256 or size is not the one written")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_text(step: int, state: Any) -> str:
    content = {"step": step, "state": state}
    hint = "use pack_state for tuples, integer keys, NaN and tensors"
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"checkpoint state: not JSON ({error}); {hint}") from error
    if json.loads(text)["state"] != state:
        raise InvalidInput(f"checkpoint state: JSON would change it; {hint}")
    return text
