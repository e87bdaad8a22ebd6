"""How does a file get onto the disk whole or not at all, whatever kills the process?

A new file is written under a temporary name, flushed to the disk, renamed over its final name, and
the folder's own entry is flushed as well. A full disk, or a folder that cannot be written to,
becomes an error that says what to do.

Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_file(pathlib.Path(folder) / "note.txt", "kept")
    ...     (pathlib.Path(folder) / "note.txt").read_text()
    'kept'
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thalweg.errors import FULL_DISK, DiskFull, IntegrityError, InvalidInput, invalid
from thalweg.limits import read_bytes

#: Names with this prefix are unfinished; readers such as pandas skip names that start with a dot.
UNFINISHED = ".writing-"

_serial = itertools.count()
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._+-]{0,118}[A-Za-z0-9_+-])?")
_NUMBERED = tuple(f"{device}{digit}" for device in ("COM", "LPT") for digit in range(10))
_DEVICES = frozenset(("CON", "PRN", "AUX", "NUL", *_NUMBERED))
_OVERHEAD = 2**16
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST)


def check_name(what: str, name: str) -> str:
    """Return `name` if it can be one component of a path; such a name cannot leave its folder.

    Raises:
        InvalidInput: `name` is empty, too long, or holds separators or other unusual characters.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = "1 to 120 letters, digits, '.', '_', '+' or '-', with a letter or digit first"
        raise invalid(what, name, allowed, "and no dot at the end")
    return name


def is_folder_name(name: str) -> bool:
    """Whether a folder can have that name on every system: Windows keeps some for its devices.

    Example:
        >>> is_folder_name("bulk-sgd"), is_folder_name("con.2"), is_folder_name("sgd.")
        (True, False, False)
    """
    return bool(_NAME.fullmatch(name)) and name.partition(".")[0].upper() not in _DEVICES


def write_file(path: Path, content: bytes | str, *, flush: bool = True) -> None:
    """Write `content` to `path` so that the old file or the whole new one is there at any instant.

    Args:
        flush: onto the disk before this returns; not for what can be made again, such as a figure.

    Raises:
        InvalidInput: the folder cannot be written to.
        DiskFull: the disk is full; the message says how many bytes were needed.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}-{next(_serial)}")
    with storage_errors(path.parent, len(data), path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            rename(temporary, path) if flush else temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def make_folder(path: Path) -> None:
    """Create a folder and those above it, with the entries flushed to the disk.

    Raises:
        InvalidInput: a folder above cannot be written to, or is a file.
        DiskFull: there is no room for one.
    """
    with storage_errors(path, file=path):
        missing = []
        for folder in (path, *path.parents):
            if folder.is_dir():
                break
            missing.append(folder)
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name `target` in one instant, replacing a file of that name, durably."""
    source.replace(target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; a folder first loses its name, so that no half is seen."""
    if path.is_dir() and not path.is_symlink():
        hidden = path
        if not path.name.startswith(UNFINISHED):
            hidden = path.with_name(f"{UNFINISHED}removed-{os.getpid()}-{next(_serial)}")
            rename(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written; only for who holds the run's lock."""
    for path in folder.glob(f"{UNFINISHED}*"):
        remove(path)


def sync_file(path: Path) -> None:
    """Flush a file that a library has written to the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (which names it holds) to the disk."""
    if os.name == "nt":  # Windows has no such call; its file systems journal renames themselves
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not know fsync on a folder; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(
    folder: Path, needed: int | None = None, file: Path | None = None
) -> Iterator[None]:
    """Turn failures of the disk below `folder` into errors with a hint.

    Args:
        folder: where the write goes; named in the message.
        needed: bytes to be written, where known.
        file: what could not be written, where known; named in place of the folder.

    Raises:
        InvalidInput: the folder is read-only, or a file stands where a folder should be.
        DiskFull: the disk is full.
    """
    try:
        with full_disk_told(folder, needed, file):
            yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise InvalidInput(
                f"folder {folder}: cannot be written to ({os.strerror(error.errno)}); "
                "choose another folder or change its permissions"
            ) from error
        if error.errno in _NOT_A_FOLDER:
            raise InvalidInput(
                f"folder {folder}: {error.filename} is a file where a folder is needed; "
                "choose another folder or move that file"
            ) from error
        raise


@contextmanager
def full_disk_told(
    folder: Path, needed: int | None = None, file: Path | None = None
) -> Iterator[None]:
    """Turn a full disk alone into the error that says what to do; see `storage_errors`.

    For all that is done in a folder, also by libraries and by a user's own code, which write where
    they like: the file that the system names is named.
    """
    try:
        yield
    except DiskFull as error:
        if file is None or needed is None:
            raise
        # What was being built has a name that nobody knows: the whole of it is named.
        raise disk_full(file, needed) from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        named = Path(error.filename) if isinstance(error.filename, str) else folder
        raise disk_full(file or named, needed, error.errno) from error


def disk_full(place: Path, needed: int | None, number: int = errno.ENOSPC) -> DiskFull:
    """Build the error for a full disk.

    Args:
        place: the file or folder.
        needed: bytes, where known.
        number: of the system's error; a quota and a limit on one file's size count as full, too.
    """
    wanted = "more room needed" if needed is None else f"{format_bytes(needed)} needed"
    if number == errno.EFBIG:
        return DiskFull(
            f"file too large: {place}: {wanted}, and this process may not write so much into one"
            " file (ulimit -f); what was saved before is kept: raise that limit, then resume"
        )
    free = free_bytes(place)
    if number == errno.EDQUOT:
        wanted += ", and your quota is used up"
    elif not _takes_one_more_file(place):
        wanted += ", and no inode is left for one more file"
    elif needed is not None and free > needed + _OVERHEAD:
        # What was half built is gone again by now, with its inodes.
        wanted += ", perhaps no inode was left for one more file"
    return DiskFull(
        f"disk full: {place}: {wanted}, {format_bytes(free)} free; "
        "what was saved before is kept: make room, then resume"
    )


def _takes_one_more_file(place: Path) -> bool:
    """Whether the file system has an inode left, as far as it says."""
    if not hasattr(os, "statvfs"):
        return True
    state = os.statvfs(_nearest_folder(place))
    return state.f_files == 0 or state.f_favail > 0


def _nearest_folder(place: Path) -> Path:
    for existing in (place, *place.absolute().parents):
        if existing.is_dir():
            return existing
    raise InvalidInput(f"folder {place}: no folder above it exists")


def free_bytes(folder: Path) -> int:
    """Return the bytes free on the disk that holds `folder` (or will hold it, once created)."""
    return shutil.disk_usage(_nearest_folder(folder)).free


def format_bytes(count: int) -> str:
    """Write a number of bytes for people, in powers of ten.

    Example:
        >>> format_bytes(999), format_bytes(34_100_000)
        ('999 bytes', '34.1 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def to_json(value: Any) -> str:
    """Write `value` as strict JSON; a float that JSON has no number for becomes "nan" or "inf".

    Raises:
        InvalidInput: `value` holds something that JSON cannot.
    """
    try:
        return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"not JSON: {error}") from error


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file holds, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """Read one JSON file of a run.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not JSON, nested without end, or larger than the limit "json_bytes".
    """
    content = read_bytes(path, "json_bytes", error=IntegrityError)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: damaged, not JSON ({error})") from error
