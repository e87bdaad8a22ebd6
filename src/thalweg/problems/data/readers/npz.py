"""How are arrays read from an npz file that may be damaged or hostile?

An npz is a zip of npy files, and a few bytes can claim gigabytes: each header is read and checked
on its own before any memory is allocated. Arrays of Python objects, which are pickles, are refused.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from thalweg.problems.data.readers.damage import check_size, unusable

Arrays = dict[str, np.ndarray]
"""Arrays by name."""

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
            numbers, or is larger than `readers.damage.LARGEST_ARRAY`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive, names, optional)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise unusable(path, f"a damaged zip ({error})", "an npz file", "fetch it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable npz file", "check the path") from error


def _read(
    path: Path, archive: zipfile.ZipFile, names: tuple[str, ...], optional: tuple[str, ...]
) -> Arrays:
    members = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    missing = [name for name in names if name not in members]
    if missing:
        found = "arrays " + (", ".join(sorted(members)) or "(none)")
        raise unusable(path, found, "arrays " + ", ".join(names), f"add {', '.join(missing)}")
    wanted = [*names, *(name for name in optional if name in members)]
    return {name: _read_member(path, archive, name) for name in wanted}


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    where = f"{path}, array {name}"
    with archive.open(f"{name}.npy") as stream:
        shape, fortran_order, dtype = _read_header(where, stream)
        if dtype.kind not in _ALLOWED_KINDS:
            what = "Python objects" if dtype.hasobject else f"values of type {dtype}"
            raise unusable(where, what, "numbers", "save plain arrays of numbers")
        size = math.prod(shape) * dtype.itemsize
        check_size(where, size)
        values = stream.read(size + 1)
    if len(values) != size:
        found = f"{len(values):,} bytes" if len(values) < size else "more bytes"
        raise unusable(where, found, f"{size:,} bytes for shape {shape}", "fetch it again")
    array = np.frombuffer(values, dtype=dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_header(where: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        else:
            header = np.lib.format.read_array_header_2_0(stream)
        if min(header[0], default=0) < 0:
            raise ValueError(f"shape {header[0]}")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise unusable(
            where, f"a bad header ({reason})", "an npy array", "save it again"
        ) from error
    return header
