"""How is the whole state of a run saved, so that a resumed run continues bit for bit?

A checkpoint is a folder `step-00001000/` with `tensors.safetensors`, `state.json` and
`manifest.json` (size and SHA-256 of both; the run that it belongs to, how many rows it had
measured, whether it was at its end, and the checkpoint before it). It is built under a temporary
name, flushed and renamed: it is there whole or not at all. No file format notices a flipped bit by
itself, so every checkpoint is checked against its manifest before use, and the newest one that
passes wins.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import IntegrityError, InvalidInput, invalid
from thalweg.lab.store import durable
from thalweg.lab.store.belonging import FORMAT, Mark, check_belongs, check_format
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
    mark: Mark | None = None,
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
        mark: what it says of its run; default: nothing.

    Returns:
        The checkpoint's folder.

    Raises:
        InvalidInput: a bad argument, a tensor with gaps or overlaps, a read-only folder.
        DiskFull: the disk is full. What was saved before is kept in both cases.
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
    with durable.storage_errors(folder, needed, target):
        _tidy(folder)
        if durable.free_bytes(folder) < needed:
            raise durable.disk_full(target, needed)
        permanent = permanent or _is_permanent(target)
        try:
            building.mkdir()
            save_tensors(building / _TENSORS, tensors)
            durable.write_file(building / _STATE, text)
            manifest = _manifest(building, step, permanent, mark or Mark(), _before(folder, step))
            durable.write_file(building / _MANIFEST, durable.to_json(manifest))
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


def latest_checkpoint(folder: Path | str, run: str = "") -> Path | None:
    """Return the newest checkpoint that passes its check, or None if there never was one.

    Args:
        folder: the run's `checkpoints/`.
        run: hash of the run that it must belong to; empty: not checked.

    Raises:
        InvalidInput: a later version of Thalweg wrote one.
        IntegrityError: there are checkpoints, and all are damaged or of another run.
    """
    candidates = _candidates(Path(folder))
    for _, path in candidates:
        try:
            verify_checkpoint(path, run)
        except IntegrityError as error:
            _logger.warning("%s; trying the one before", error)
        else:
            return path
    if candidates:
        names = ", ".join(path.name for _, path in candidates)
        raise IntegrityError(
            f"{folder}: all checkpoints are damaged or of another run: {names}; to start the run"
            " anew: thalweg check STUDY --repair"
        )
    return None


def verify_checkpoint(path: Path, run: str = "") -> Mark:
    """Check every file of a checkpoint, and that it belongs to the run; return what it says of it.

    Raises:
        InvalidInput: a later version of Thalweg wrote it.
        IntegrityError: a file is missing, is not what was saved, or is of another run.
    """
    manifest = _verify(path)
    mark = _mark_of(path, manifest)
    check_belongs(path, mark.run, run)
    _check_before(path, manifest)
    return mark


def read_mark(path: Path) -> Mark:
    """Return what a checkpoint says of its run, by its manifest alone; see `verify_checkpoint`.

    Before format 3 it says no more than whether the run was at its end.
    """
    return _mark_of(path, _read_manifest(path))


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


def _manifest(
    folder: Path, step: int, permanent: bool, mark: Mark, before: dict[str, Any] | None
) -> dict[str, Any]:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (_TENSORS, _STATE)
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "permanent": permanent,
        "files": files,
        "mark": asdict(mark),
        "before": before,
    }
    return {**manifest, "sha256": durable.digest_of(manifest)}


def _before(folder: Path, step: int) -> dict[str, Any] | None:
    """Step and digest of the newest readable checkpoint before this step; None without one."""
    for path in reversed(list_checkpoints(folder)):
        if _step_of(path) < step:
            try:
                return {"step": _step_of(path), "sha256": durable.digest_of(_read_manifest(path))}
            except IntegrityError:
                continue
    return None


def _check_before(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the checkpoint before this one, where it is still there, with what was there."""
    before = manifest.get("before")
    if before is None:
        return
    earlier = checkpoint_path(path.parent, before["step"])
    try:
        known = durable.digest_of(_read_manifest(earlier)) if earlier.is_dir() else before["sha256"]
    except IntegrityError:
        return  # that one is the damaged one
    if known != before["sha256"]:
        raise IntegrityError(f"{earlier}: is not the checkpoint that {path.name} was made after")


def _mark_of(path: Path, manifest: Mapping[str, Any]) -> Mark:
    if "mark" in manifest:
        return Mark(**manifest["mark"])
    try:
        position = durable.read_json(path / _STATE)["state"]["state"]["progression"]
        return Mark(finished=bool(position["finished"]))
    except (OSError, KeyError, TypeError, IntegrityError):
        return Mark()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = durable.read_json(path / _MANIFEST)
    except OSError as error:
        raise IntegrityError(f"{path}: no readable {_MANIFEST} ({error.strerror})") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != durable.digest_of(
        manifest
    ):
        raise IntegrityError(f"{path / _MANIFEST}: damaged")
    check_format(path / _MANIFEST, manifest.get("format"))
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
    for name in (_TENSORS, _STATE):  # no other file is opened, whatever the manifest names
        file, wanted = path / name, manifest["files"].get(name)
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
