"""How is an IDX file read, MNIST's own format, plain or gzip-compressed?

Layout: two zero bytes, a byte for the type (0x08: unsigned byte), a byte for the number of
dimensions, one big-endian uint32 per dimension, the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from thalweg.problems.data.readers.damage import check_size, unusable

_UNSIGNED_BYTE = 0x08
_MOST_DIMENSIONS = 4


def read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes.

    Returns:
        array of uint8, of the dimensions that the file states.

    Raises:
        InvalidInput: missing, truncated, corrupt, of another type, or too large.
    """
    try:
        with _open(path) as stream:
            return _read(path, stream)
    except MemoryError as error:
        raise unusable(path, "more than memory holds", "an IDX file", "cut it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise unusable(
            path, f"damaged gzip data ({error})", "a whole .gz file", "fetch it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable IDX file", "check the path") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _read(path: Path, stream: BinaryIO) -> np.ndarray:
    dimensions = _read_dimensions(path, stream)
    size = math.prod(dimensions)
    check_size(path, size)
    values = stream.read(size + 1)  # one more, to notice bytes too many
    if len(values) != size:
        shape = " x ".join(str(dimension) for dimension in dimensions)
        found = f"{len(values):,} bytes of values" if len(values) < size else "more bytes"
        raise unusable(path, found, f"{size:,} ({shape}, by its header)", "fetch it again")
    return np.frombuffer(values, dtype=np.uint8).reshape(dimensions)


def _read_dimensions(path: Path, stream: BinaryIO) -> tuple[int, ...]:
    magic = stream.read(4)
    valid = len(magic) == 4 and magic[:3] == bytes((0, 0, _UNSIGNED_BYTE))
    if not valid or not 1 <= magic[3] <= _MOST_DIMENSIONS:
        found = f"first bytes {magic.hex(' ') or '(none)'}"
        raise unusable(
            path, found, f"00 00 08 and 1 to {_MOST_DIMENSIONS} dimensions", "is it an IDX file?"
        )
    rank = magic[3]
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise unusable(path, "the end of the file", f"{rank} dimensions", "fetch it again")
    return struct.unpack(f">{rank}I", header)
