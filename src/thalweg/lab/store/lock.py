"""Who may write to a run folder? One process at a time; a second one is refused.

The lock belongs to an open file, so the operating system releases it when the process ends, however
it ends: after `kill -9` there is no stale lock to clean up. The lock file itself stays and names
its last holder.

On NFS, Linux passes the lock to the server, so that it also holds between machines, unless the
share is mounted with `nolock` or `local_lock=all`: then only processes of one machine see it. A
forked child shares its parent's lock until both have ended.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from thalweg.errors import InUse
from thalweg.lab.store import durable
from thalweg.lab.store.links import open_plain

_LONGEST_HOLDER = 10_000
_FILE = ".lock"
#: `is_locked` holds the lock for some microseconds: a holder-to-be tries again before giving up.
_ATTEMPTS, _PAUSE = 5, 0.05
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
#: Windows keeps others from reading locked bytes: lock one far behind the text.
_WINDOWS_BYTE = 1 << 30


@contextmanager
def locked(folder: Path, what: str = "run folder") -> Iterator[None]:
    """Hold the lock of a run folder, or of a study's (`what` says which, for messages).

    Raises:
        InUse: another process holds it; the message names its number and machine.
        InvalidInput: the folder cannot be written to.
        IntegrityError: the lock is a link, or no plain file.
    """
    with durable.storage_errors(folder, file=folder / _FILE):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        file = os.fdopen(open_plain(folder / _FILE, flags), "a+", encoding="utf-8")
    with file:
        if not _acquire(file):
            raise InUse(
                f"{what} {folder}: in use by {_holder(file)}; wait until that ends, or stop it"
            )
        with durable.storage_errors(folder, file=folder / _FILE):
            file.seek(0)
            file.truncate()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))
            file.flush()
        try:
            yield
        finally:
            _release(file)


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock now."""
    try:
        file = os.fdopen(open_plain(folder / _FILE, os.O_RDONLY), encoding="utf-8")
    except FileNotFoundError:
        return False
    with file:
        try:
            free = _try_lock(file, shared=True)
        except OSError:  # this file system has no locks: nothing is known
            return False
        if free:
            _release(file)
        return not free


def _acquire(file: IO[str]) -> bool:
    for _ in range(_ATTEMPTS):
        try:
            if _try_lock(file, shared=False):
                return True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{file.name}: this file system has no locks ({error.strerror}): nothing keeps a "
                "second process from writing to the same run",
                stacklevel=4,
            )
            return True
        time.sleep(_PAUSE)
    return False


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read(_LONGEST_HOLDER))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, OSError, TypeError, LookupError, RecursionError):
        return "another process"  # in this instant, its name not yet written; or nonsense


if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[str], shared: bool) -> bool:
        os.lseek(file.fileno(), _WINDOWS_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
        finally:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        return True

    def _release(file: IO[str]) -> None:
        os.lseek(file.fileno(), _WINDOWS_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: IO[str], shared: bool) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
