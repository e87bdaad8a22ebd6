"""How are labelled phrases read from tab-separated text, plain or inside the GLUE archive?

The first line names the columns, in any order; one is `label`, one is the text. There is no
quoting: a quotation mark is a character of the phrase.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from thalweg.problems.data.readers.damage import LARGEST_TEXT, check_size, unusable

TEXT_COLUMNS = ("sentence", "content", "text", "phrase")


def decode_phrases(source: str, content: bytes, num_classes: int) -> tuple[list[str], list[int]]:
    """Decode UTF-8 text with a header line.

    Returns:
        the phrases and their labels, in the order of the file.

    Raises:
        InvalidInput: no such columns, not UTF-8, a line with too few columns, a bad label, no line.
    """
    try:
        lines = content.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} that is not UTF-8"
        raise unusable(source, found, "text in UTF-8", "save it as UTF-8") from error
    text_column, label_column = _columns(source, lines[0].rstrip("\r"))
    phrases: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.rstrip("\r").split("\t")
        if len(fields) <= max(text_column, label_column):
            found = f"{len(fields)} column(s) in line {number}"
            expected = f"at least {max(text_column, label_column) + 1}"
            raise unusable(source, found, expected, "is the file whole?")
        phrases.append(fields[text_column])
        labels.append(_label(source, number, fields[label_column], num_classes))
    if not phrases:
        raise unusable(source, "no line below the header", "at least one", "is the file whole?")
    return phrases, labels


def _columns(source: str, header: str) -> tuple[int, int]:
    names = [name.strip().lower() for name in header.lstrip("\ufeff").split("\t")]
    text = next((names.index(name) for name in TEXT_COLUMNS if name in names), None)
    if text is None or "label" not in names:
        expected = f"columns 'label' and one of {', '.join(TEXT_COLUMNS)}"
        hint = "name the columns in the first line, separated by tabs"
        raise unusable(source, f"the first line {header[:80]!r}", expected, hint)
    return text, names.index("label")


def _label(source: str, line: int, given: str, num_classes: int) -> int:
    given = given.strip()
    if not (given.isascii() and given.isdigit() and int(given) < num_classes):
        expected = f"an integer from 0 to {num_classes - 1}"
        raise unusable(
            source, f"label {given[:40]!r} in line {line}", expected, "correct that line"
        )
    return int(given)


def read_phrases(path: Path, num_classes: int) -> tuple[list[str], list[int]]:
    """Read a .tsv file; returns and raises as `decode_phrases`, also when it cannot be read."""
    try:
        check_size(path, path.stat().st_size, LARGEST_TEXT)
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable file", "check the path") from error
    return decode_phrases(str(path), content, num_classes)


def read_phrases_from_archive(
    path: Path, member: str, num_classes: int
) -> tuple[list[str], list[int]]:
    """Read one member of a zip without unpacking it to disk.

    Returns and raises as `decode_phrases`, also when the archive is damaged or lacks the member.
    """
    where = f"{path}, member {member}"
    try:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                found = "members " + ", ".join(archive.namelist()[:8])
                raise unusable(path, found, member, "is it the GLUE archive SST-2.zip?")
            check_size(where, archive.getinfo(member).file_size, LARGEST_TEXT)
            content = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise unusable(path, f"a damaged zip ({error})", "SST-2.zip", "fetch it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise unusable(path, reason, "a readable zip", "check the path") from error
    return decode_phrases(where, content, num_classes)
