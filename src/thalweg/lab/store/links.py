"""Does a study's folder hold itself alone? A link, a pipe or a device in it is never opened.

A folder that comes from elsewhere may hold a `.lock` that is a link to one of your files, or a pipe
that nobody writes to. So a study is looked through before anything of it is opened, and refused by
the name of what is neither a file nor a folder. What `thalweg check --repair` has set aside is not
looked at: nothing of it is opened.

Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (pathlib.Path(folder) / "notes").write_text("here")
    ...     foreign_entries(pathlib.Path(folder))
    4
    []
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from thalweg.errors import IntegrityError

ASIDE = "set-aside-"
"""How the names of folders begin that hold what was moved aside."""
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def foreign_entries(folder: Path) -> list[Path]:
    """Return what is neither a file nor a folder, anywhere in a study's folder.

    A run at work may remove what it has made while this looks: that is passed over.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    found: list[Path] = []
    waiting = _entries(folder)
    while waiting:
        entry = waiting.pop()
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith(ASIDE):
                with suppress(FileNotFoundError):
                    waiting += _entries(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            path = Path(entry.path)
            if path.is_symlink() or path.exists():
                found.append(path)
    return sorted(found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def refuse_foreign_entries(folder: Path) -> None:
    """Check that a study's folder holds files and folders alone.

    Raises:
        IntegrityError: it holds something else, which is named.
    """
    if found := foreign_entries(folder):
        raise IntegrityError(describe_foreign(found[0]))


def describe_foreign(path: Path) -> str:
    """One line on what is neither a file nor a folder."""
    kind = "a link" if path.is_symlink() else "no file but a pipe or a device"
    return (
        f"{path}: is {kind}, and is not opened; put a copy of what belongs there in its place, or"
        " move it aside: thalweg check STUDY --repair"
    )


def leads_outside(study: Path, root: Path) -> bool:
    """Return whether a study's folder is a link to somewhere that is not below the root."""
    return study.is_symlink() and not study.resolve().is_relative_to(root.resolve())


def open_plain(path: Path, flags: int) -> int:
    """Open a file by a descriptor: never through a link, and never waiting for a pipe.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is no plain file.
    """
    try:
        descriptor = os.open(path, flags | _CAREFUL, 0o644)
    except OSError as error:
        if path.is_symlink() or path.is_fifo():
            raise IntegrityError(describe_foreign(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(describe_foreign(path))
    return descriptor
