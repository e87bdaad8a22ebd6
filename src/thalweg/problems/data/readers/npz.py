"""How are arrays read from an npz file that may be damaged or hostile?

An npz is a zip of npy files, and a few bytes can claim gigabytes: each header is read and checked
on its own before any memory is allocated. Arrays of Python objects, which are pickles, are refused.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from thalweg.errors import shown
from thalweg.problems.data.readers.damage import check_size, open_member, opened_zip, unusable

Arrays = dict[str, np.ndarray]
"""Arrays by name."""

_MOST_DIMENSIONS = 32
_LONGEST = 2**48
_ALLOWED_KINDS = "biuf"  # bool, signed, unsigned, floating


def read_npz(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> Arrays:
    """Read named arrays.

    Args:
        path: the file.
        names: arrays that must be there.
        optional: arrays that are read when they are there.

    Returns:
        the arrays by name.

    Raises:
        InvalidInput: missing, truncated or corrupt; an array is missing, holds anything but
            numbers, or all together are larger than the limit "array_bytes".
    """
    with opened_zip(path, "npz file") as archive:
        return _read(path, archive, names, optional)


def _read(
    path: Path, archive: zipfile.ZipFile, names: tuple[str, ...], optional: tuple[str, ...]
) -> Arrays:
    members = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    missing = [name for name in names if name not in members]
    if missing:
        found = "arrays " + (", ".join(sorted(members)) or "(none)")
        raise unusable(path, found, "arrays " + ", ".join(names), f"add {', '.join(missing)}")
    wanted = [*names, *(name for name in optional if name in members)]
    arrays: Arrays = {}
    total = 0
    for name in wanted:
        arrays[name] = _read_member(path, archive, name, total)
        total += arrays[name].nbytes
    return arrays


def _read_member(path: Path, archive: zipfile.ZipFile, name: str, before: int) -> np.ndarray:
    """One array; `before` are the bytes of those that were read already."""
    where = f"{path}, array {name}"
    with open_member(archive, f"{name}.npy", where) as stream:
        shape, fortran_order, dtype = _read_header(where, stream)
        if dtype.kind not in _ALLOWED_KINDS:
            what = "Python objects" if dtype.hasobject else f"values of type {dtype}"
            raise unusable(where, what, "numbers", "save plain arrays of numbers")
        size = math.prod(shape) * dtype.itemsize
        check_size(where, before + size)
        values = stream.read(size + 1)
    if len(values) != size:
        found = f"{len(values):,} bytes" if len(values) < size else "more bytes"
        raise unusable(where, found, f"{size:,} bytes for shape {shape}", "fetch it again")
    array = np.frombuffer(values, dtype=dtype) if size else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_header(where: str, stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*Python 2.*")  # it would be read with a warning
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(stream)
            else:
                header = np.lib.format.read_array_header_2_0(stream)
        shape = header[0]
        sizes = [type(length) is int and 0 <= length < _LONGEST for length in shape]
        if not all(sizes) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"shape {shown(shape, 80)}")
    except Exception as error:  # a literal of Python, which can be wrong in every way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise unusable(
            where, f"a bad header ({reason})", "an npy array", "save it again"
        ) from error
    return header
