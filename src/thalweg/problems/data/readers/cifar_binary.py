"""How is the binary version of CIFAR-10 read, from its files or straight from the archive?

A file holds records of 3,073 bytes: a label (0 to 9), then 32 x 32 red, green, blue values, row by
row. (The "python version" of the same data is a set of pickles and is not read.)
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from thalweg.problems.data.readers.damage import check_size, unusable

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
_RECORD = 1 + 3 * 32 * 32


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
    try:
        check_size(path, path.stat().st_size)
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable file", "check the path") from error
    return decode_cifar(str(path), content)


def read_cifar_archive(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the known files of `cifar-10-binary.tar.gz` without unpacking it to disk.

    Returns:
        images and labels by file name (`data_batch_1.bin`, ...); other members are passed over.

    Raises:
        InvalidInput: missing, truncated or corrupt, or a member is damaged.
    """
    known = {*TRAIN_FILES, TEST_FILE}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                stream = archive.extractfile(member) if name in known and member.isreg() else None
                if stream is not None:
                    check_size(f"{path}, member {name}", member.size)
                    found[name] = decode_cifar(f"{path}, member {name}", stream.read())
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise unusable(
            path, f"a damaged archive ({error})", "cifar-10-binary.tar.gz", "fetch it again"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable archive", "check the path") from error
    return found
