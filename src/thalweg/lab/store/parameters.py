"""How do a user's own trained parameters get in, without running code from the file?

A `.safetensors` file holds tensors only. A `.pt` or `.pth` file is a pickle: it is read with
`weights_only=True`, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import IntegrityError, InvalidInput, ThalwegError, invalid
from thalweg.lab.store.tensors import check_header
from thalweg.limits import check_limit

if TYPE_CHECKING:
    from torch import Tensor

_PICKLED = (".pt", ".pth")
#: What torch says where a file holds more than tensors.
_OF_OBJECTS = ("Unsupported global", "Unsupported class", "Trying to call reduce")
#: Under which of these keys training scripts usually keep the parameters among other things.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model")


def load_parameters(path: Path | str) -> dict[str, Tensor]:
    """Read named parameters from a file, onto the CPU.

    Args:
        path: `.safetensors`, or `.pt`/`.pth` holding a `state_dict()`, alone or under the key
            "state_dict", "model_state_dict" or "model".

    Raises:
        InvalidInput: no such file, another ending, or a file that holds more than tensors.
        IntegrityError: the file is damaged.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_PICKLED):
        raise invalid("parameters file", str(path), "a name ending in .safetensors, .pt or .pth")
    if not path.is_file():
        raise invalid("parameters file", str(path), "an existing file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _find_parameters(_load_pickled(path), path)


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        check_header(path)
        return load_file(path)
    except ThalwegError:
        raise
    except Exception as error:  # the library's own, and those of a type that torch has not
        raise IntegrityError(
            f"{path}: damaged, not a safetensors file ({_reason(error)})"
        ) from error


def _load_pickled(path: Path) -> Any:
    import torch

    try:
        _check_claims(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ThalwegError:
        raise
    except pickle.UnpicklingError as error:
        if not any(words in str(error) for words in _OF_OBJECTS):
            raise IntegrityError(f"{path}: damaged, torch cannot read it") from error
        raise InvalidInput(
            f"{path}: holds Python objects beside tensors, which are not loaded because they could "
            "run code; save the parameters alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a flipped bit can show as an error of nearly any class
        raise IntegrityError(f"{path}: damaged, torch cannot read it ({_reason(error)})") from error


def _check_claims(path: Path) -> None:
    """Compare what a file claims to hold with its size, before torch allocates memory for it.

    torch stores tensors as they are; where somebody has packed them they count as unpacked data.
    """
    size = path.stat().st_size
    check_limit("parameters_bytes", size, path)
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6: memory is taken as values are read
    from thalweg.problems.data.readers.damage import opened_zip

    with opened_zip(path, "file of torch.save") as archive:
        records = archive.infolist()
        stored = sum(r.file_size for r in records if r.compress_type == zipfile.ZIP_STORED)
        packed = sum(r.file_size for r in records if r.compress_type != zipfile.ZIP_STORED)
    if stored > size:
        raise IntegrityError(f"{path}: damaged, it claims {stored:,} bytes and has {size:,}")
    check_limit("array_bytes", packed, path)


def _reason(error: Exception) -> str:
    """What a library says, in one line; torch appends where in its code that was."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _find_parameters(content: Any, path: Path) -> dict[str, Tensor]:
    candidates = [content]
    if isinstance(content, dict):
        candidates += [content[key] for key in _USUAL_KEYS if key in content]
    for candidate in candidates:
        if _is_parameters(candidate):
            return dict(candidate)
    held = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise invalid(
        f"parameters file {path}",
        held,
        "a dictionary of tensors by name, alone or under " + ", ".join(_USUAL_KEYS),
        "save them with torch.save(model.state_dict(), path)",
    )


def _is_parameters(content: Any) -> bool:
    import torch

    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items())
    )
