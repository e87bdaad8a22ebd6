"""How is the binary version of CIFAR-10 read, from its files or straight from the archive?

A file holds records of 3,073 bytes: a label (0 to 9), then 32 x 32 red, green, blue values, row by
row. (The "python version" of the same data is a set of pickles and is not read.)
"""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from thalweg.errors import InvalidInput
from thalweg.limits import limit
from thalweg.problems.data.readers.damage import check_size, read_whole, unusable

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
_RECORD = 1 + 3 * 32 * 32
_LARGEST_PIECE = 2**26
"""Bytes of an archive that are read at once: what describes its files is much shorter."""
_XZ = b"\xfd7zXZ\x00"


def decode_cifar(source: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode records.

    Returns:
        images (n, 3, 32, 32) uint8 and labels (n,) uint8.

    Raises:
        InvalidInput: no whole number of records, none at all, or a label above 9.
    """
    if not content or len(content) % _RECORD:
        expected = f"a positive multiple of {_RECORD:,} bytes"
        raise unusable(source, f"{len(content):,} bytes", expected, "fetch it again")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        found = f"label {labels.max()} in record {int(labels.argmax())}"
        raise unusable(source, found, "labels 0 to 9", "is it the binary version of CIFAR-10?")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def read_cifar_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one `.bin` file; returns and raises as `decode_cifar`."""
    content = read_whole(path, "array_bytes", "a readable file", "check the path")
    return decode_cifar(str(path), content)


def read_cifar_archive(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the known files of `cifar-10-binary.tar.gz` without unpacking it to disk.

    Returns:
        images and labels by file name (`data_batch_1.bin`, ...); other members are passed over.

    Raises:
        InvalidInput: missing, truncated or corrupt, a member is damaged, or the archive is larger
            than the limit "array_bytes" once it is unpacked.
    """
    try:
        with _unpacked(path) as stream:
            bounded: Any = _Bounded(path, stream)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                return _read_members(path, archive)
    except InvalidInput:
        raise
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or not error.errno:
            raise _damaged(path, error) from error
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable archive", "check the path") from error
    except MemoryError as error:
        raise unusable(path, "more than memory holds", "an archive", "cut it") from error
    except Exception as error:  # a flipped bit can show as an error of nearly any class
        raise _damaged(path, error) from error


def _read_members(path: Path, archive: tarfile.TarFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    known = {*TRAIN_FILES, TEST_FILE}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    most = limit("archive_members")
    for number, member in enumerate(archive):
        if number >= most:
            raise unusable(path, f"more than {most:,} files", "the archive", "is it the right one?")
        name = PurePosixPath(member.name).name
        wanted = name in known and name not in found and member.isreg() and not member.issparse()
        stream = archive.extractfile(member) if wanted else None
        if stream is not None:
            check_size(f"{path}, member {name}", member.size)
            found[name] = decode_cifar(f"{path}, member {name}", stream.read())
    return found


def _damaged(path: Path, error: Exception) -> InvalidInput:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    hint = "fetch it again"
    return unusable(path, f"a damaged archive ({reason})", "cifar-10-binary.tar.gz", hint)


def _unpacked(path: Path) -> IO[bytes]:
    """The tar inside of a file, unpacked as it is read."""
    with path.open("rb") as file:
        first = file.read(len(_XZ))
    if first == _XZ:  # a few bytes of it may ask for gigabytes
        raise unusable(path, "an xz archive", "gzip, bzip2 or a plain tar", "pack it with gzip")
    if first.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if first.startswith(b"BZh"):
        return bz2.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


class _Bounded(io.RawIOBase):
    """A stream of which nothing is read beyond a limit, and no large piece at once."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream
        self._most = limit("array_bytes")

    def read(self, size: int = -1, /) -> bytes:
        piece = self._most if size is None or size < 0 else size
        check_size(self._path, self._stream.tell() + piece)
        if piece > _LARGEST_PIECE:
            found = f"a description of {piece:,} bytes"
            raise unusable(self._path, found, f"at most {_LARGEST_PIECE:,}", "fetch it again")
        return self._stream.read(piece)

    def seek(self, position: int, whence: int = 0, /) -> int:
        check_size(self._path, position if whence == 0 else 0)
        return self._stream.seek(position, whence)

    def tell(self) -> int:
        return self._stream.tell()
