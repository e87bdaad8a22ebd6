"""What is said about a file that cannot be used, and how are whole files and archives opened?

Limits are those of `thalweg.limits`. An archive's directory, its way of packing and the sizes that
it claims are looked at before anything of it is unpacked.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thalweg.errors import InvalidInput
from thalweg.limits import SETTING, limit

_LARGEST_DIRECTORY = 256
"""Bytes of a zip's directory for each of the files that it may have."""
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Ways of packing that can be unpacked piece by piece: others make gigabytes of one piece."""


def unusable(file: Path | str, found: str, expected: str, hint: str) -> InvalidInput:
    """Build the error for a file: its name, what was found, what was expected, a hint."""
    return InvalidInput(f"file {file}: found {found}, expected {expected}; {hint}")


def check_size(file: Path | str, claimed: int, name: str = "array_bytes") -> None:
    """Refuse data before memory is allocated for them.

    Raises:
        InvalidInput: `claimed`, in bytes, is above the limit of that name.
    """
    allowed = limit(name)
    if claimed > allowed:
        raise unusable(
            file,
            f"{claimed:,} bytes of data",
            f"at most {allowed:,}",
            "check where the file comes from, or cut it to the samples that you need; if it is"
            f" right, raise the limit: {SETTING}={name}={claimed}",
        )


def read_text(path: Path, expected: str, hint: str) -> str:
    """The text of a UTF-8 file.

    Args:
        expected: what messages say that it should hold.
        hint: what they advise where it cannot be read.

    Raises:
        InvalidInput: it cannot be read, is too large, or is not UTF-8.
    """
    text = decoded(path, read_whole(path, "text_bytes", expected, hint))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decoded(source: Path | str, content: bytes) -> str:
    """UTF-8 text.

    Raises:
        InvalidInput: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} that is not UTF-8"
        raise unusable(source, found, "text in UTF-8", "save it as UTF-8") from error


def read_whole(path: Path, name: str, expected: str, hint: str) -> bytes:
    """A whole file of at most the limit of that name, also one that says a wrong size.

    Raises:
        InvalidInput: it cannot be read, or is too large.
    """
    try:
        check_size(path, path.stat().st_size, name)
        with path.open("rb") as file:
            content = file.read(limit(name) + 1)
    except OSError as error:
        raise unusable(path, error.strerror or str(error), expected, hint) from error
    check_size(path, len(content), name)
    return content


@contextmanager
def opened_zip(path: Path, expected: str) -> Iterator[zipfile.ZipFile]:
    """A zip, for the time of the context; damage that shows in it is told as such.

    Args:
        expected: what messages say that it should be.

    Raises:
        InvalidInput: it cannot be read, is damaged, or has more files than the limit.
    """
    most = limit("archive_members")
    try:
        with _Directory(path, most * _LARGEST_DIRECTORY) as file, zipfile.ZipFile(file) as archive:
            if len(archive.filelist) > most:
                found = f"{len(archive.filelist):,} files"
                hint = f"if it is right, raise the limit: {SETTING}=archive_members=..."
                raise unusable(path, found, f"at most {most:,}", hint)
            file.most = None
            yield archive
    except InvalidInput:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, f"a readable {expected}", "check the path") from error
    except MemoryError as error:
        raise unusable(path, "more than memory holds", expected, "cut it") from error
    except Exception as error:  # a flipped bit can show as an error of nearly any class
        reason = " ".join(str(error).split())[:200]
        found = f"a damaged zip ({reason or type(error).__name__})"
        raise unusable(path, found, expected, "fetch it again") from error


def open_member(archive: zipfile.ZipFile, member: str, where: str) -> io.BufferedIOBase:
    """One file of a zip, to be read piece by piece.

    Raises:
        InvalidInput: it is packed in another way than zips are by default.
    """
    info = archive.getinfo(member)
    if info.compress_type not in _PACKED:
        found = f"compression {info.compress_type}"
        raise unusable(where, found, "deflated or stored files", "pack it as a plain zip")
    return archive.open(info)  # type: ignore[return-value]


class _Directory(io.BufferedReader):
    """A file of which no piece larger than `most` bytes is read, until that is None."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(io.FileIO(path))
        self.most: int | None = most
        self._path = path

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None and size is not None and size > self.most:
            found = f"a directory of {size:,} bytes"
            raise unusable(self._path, found, f"at most {self.most:,}", "fetch it again")
        return super().read(size)
