"""How are named tensors written to one safetensors file, and read back bit for bit, strides too?

safetensors stores every tensor row-major. The same numbers in another memory layout make sums in
another order, so a resumed run would differ in its last bits: the strides are kept beside the
tensors, in the file's own metadata.

Example:
    >>> import pathlib, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "tensors.safetensors"
    ...     save_tensors(path, {"basis": torch.zeros(3, 5).T})
    ...     load_tensors(path)["basis"].stride()
    (1, 5)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import IntegrityError, InvalidInput, invalid
from thalweg.lab.store import durable
from thalweg.limits import check_limit

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a new file and flush it to the disk.

    Tensors that share memory (tied weights, views of one vector) are written once each.

    Raises:
        InvalidInput: a tensor with gaps or overlaps in memory, or of a kind that cannot be stored.
        OSError: the disk is full, or the folder read-only.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    strides = {name: _unusual_strides(name, tensor) for name, tensor in tensors.items()}
    kept = {name: value for name, value in strides.items() if value is not None}
    try:
        save_file(_unshared(tensors), path, metadata={"strides": json.dumps(kept)})
    except KeyError as error:
        raise InvalidInput(f"checkpoint tensors: safetensors has no dtype {error}") from error
    except SafetensorError as error:
        # The library hands on the system's error as text only.
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
    durable.sync_file(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote: fresh CPU tensors of the same dtypes, shapes and strides.

    Raises:
        IntegrityError: it is not what was written, or above a limit.
        OSError: it cannot be read.
    """
    from safetensors import safe_open

    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            strides = json.loads((file.metadata() or {}).get("strides", "{}"))
            names = list(file.keys())
            return {name: _restored(file.get_tensor(name), strides.get(name)) for name in names}
    except OSError:
        raise
    except Exception as error:  # the library's own, and those of strides that are none
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(f"{path}: damaged, not what was saved ({reason})") from error


def check_header(path: Path) -> None:
    """Compare what a safetensors file claims with its size and with limits, before it is opened.

    Raises:
        IntegrityError: its header is longer than the file, or above a limit.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
    if length > size - 8:
        raise IntegrityError(f"{path}: damaged, not a safetensors file (its header is cut short)")
    check_limit("json_bytes", length, path, f"a header of {length:,} bytes", error=IntegrityError)
    check_limit("parameters_bytes", size, path, error=IntegrityError)


def _restored(tensor: Tensor, strides: list[int] | None) -> Tensor:
    import torch

    # Always a copy: memory of the file is aligned to 8 bytes only, and BLAS may sum in another
    # order at another alignment; nor may a later change of the file reach these tensors.
    if strides is None:
        return tensor.clone()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
    if last + 1 != tensor.numel() or min(strides, default=0) < 0:
        raise ValueError(f"strides {strides} of shape {tuple(tensor.shape)}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:  # safetensors refuses shared memory
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return plain


def _unusual_strides(name: str, tensor: Tensor) -> list[int] | None:
    """Return the strides where they are not the row-major ones."""
    import torch

    if name == "__metadata__":
        raise invalid("checkpoint tensor", name, "any other name", "safetensors reserves this one")
    if tensor.layout != torch.strided:
        raise invalid(f"checkpoint tensor {name}", str(tensor.layout), "a dense tensor")
    if tensor.numel() == 0 or list(tensor.stride()) == _row_major(tensor.shape):
        return None
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if not tensor.permute(by_stride).is_contiguous():
        raise invalid(
            f"checkpoint tensor {name}",
            f"shape {tuple(tensor.shape)} with strides {tensor.stride()}",
            "memory without gaps or overlaps",
            "pass tensor.contiguous(), and train with that too: another layout, other last bits",
        )
    return list(tensor.stride())


def _row_major(shape: tuple[int, ...]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]
