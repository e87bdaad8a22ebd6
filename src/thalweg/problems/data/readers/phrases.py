"""How are labelled phrases read from tab-separated text, plain or inside the GLUE archive?

The first line names the columns, in any order; one is `label`, one is the text. There is no
quoting: a quotation mark is a character of the phrase.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from thalweg.problems.data.readers.damage import (
    check_size,
    decoded,
    open_member,
    opened_zip,
    read_whole,
    unusable,
)

_MOST_DIGITS = 18
TEXT_COLUMNS = ("sentence", "content", "text", "phrase")


def decode_phrases(source: str, content: bytes, num_classes: int) -> tuple[list[str], list[int]]:
    """Decode UTF-8 text with a header line.

    Returns:
        the phrases and their labels, in the order of the file.

    Raises:
        InvalidInput: no such columns, not UTF-8, a line with too few columns, a bad label, no line.
    """
    lines = _lines(decoded(source, content).rstrip("\n"))
    text_column, label_column = _columns(source, next(lines))
    phrases: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) <= max(text_column, label_column):
            found = f"{len(fields)} column(s) in line {number}"
            expected = f"at least {max(text_column, label_column) + 1}"
            raise unusable(source, found, expected, "is the file whole?")
        phrases.append(fields[text_column])
        labels.append(_label(source, number, fields[label_column], num_classes))
    if not phrases:
        raise unusable(source, "no line below the header", "at least one", "is the file whole?")
    return phrases, labels


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, one after the other: a list of them takes twenty times the text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end].rstrip("\r")
        start = end + 1
    yield text[start:].rstrip("\r")


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
    plain = given.isascii() and given.isdigit() and len(given) <= _MOST_DIGITS
    if not (plain and int(given) < num_classes):
        expected = f"an integer from 0 to {num_classes - 1}"
        raise unusable(
            source, f"label {given[:40]!r} in line {line}", expected, "correct that line"
        )
    return int(given)


def read_phrases(path: Path, num_classes: int) -> tuple[list[str], list[int]]:
    """Read a .tsv file; returns and raises as `decode_phrases`, also when it cannot be read."""
    content = read_whole(path, "text_bytes", "a readable file", "check the path")
    return decode_phrases(str(path), content, num_classes)


def read_phrases_from_archive(
    path: Path, member: str, num_classes: int
) -> tuple[list[str], list[int]]:
    """Read one member of a zip without unpacking it to disk.

    Returns and raises as `decode_phrases`, also when the archive is damaged or lacks the member.
    """
    where = f"{path}, member {member}"
    with opened_zip(path, "SST-2.zip") as archive:
        if member not in archive.namelist():
            found = "members " + ", ".join(name[:80] for name in archive.namelist()[:8])
            raise unusable(path, found, member, "is it the GLUE archive SST-2.zip?")
        size = archive.getinfo(member).file_size
        check_size(where, size, "text_bytes")
        with open_member(archive, member, where) as stream:
            content = stream.read(size + 1)
    return decode_phrases(where, content, num_classes)
