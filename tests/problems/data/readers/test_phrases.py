from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.phrases import (
    decode_phrases,
    read_phrases,
    read_phrases_from_archive,
)


@pytest.mark.parametrize(
    "text",
    [
        "sentence\tlabel\na good film\t1\nso bad\t0\n",
        "label\tsentence\n1\ta good film\n0\tso bad",
        "label\tcontent\r\n1\ta good film\r\n0\tso bad\r\n",
        "\ufeffindex\tLabel\ttext\n7\t1\ta good film\n8\t0\tso bad\n",
    ],
)
def test_columns_are_found_by_name(text: str) -> None:
    assert decode_phrases("file", text.encode(), 2) == (["a good film", "so bad"], [1, 0])


def test_quotation_marks_are_characters() -> None:
    content = b'label\tsentence\n1\t" open quote\n0\tnext\n'
    assert decode_phrases("file", content, 2)[0] == ['" open quote', "next"]


def test_unusual_line_ends_within_a_phrase_do_not_split_it() -> None:
    content = "label\tsentence\n1\ta\u2028b\x0bc\n".encode()
    assert decode_phrases("file", content, 2)[0] == ["a\u2028b\x0bc"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first line ''"),
        (b"a good film\t1\n", "the first line"),
        (b"label\tsentence\n", "no line below the header"),
        (b"label\tsentence\n1\n", r"1 column\(s\) in line 2"),
        (b"label\tsentence\n2\tx\n", "label '2' in line 2, expected an integer from 0 to 1"),
        (b"label\tsentence\n1\tx\n-1\ty\n", "label '-1' in line 3"),
        (b"label\tsentence\n\xff\tx\n", "byte 15 that is not UTF-8"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"train\.tsv: found " + message):
        read_phrases(tmp_path / "train.tsv", 2)


def test_a_member_of_an_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("SST-2/train.tsv", "sentence\tlabel\nfine\t1\n")
    found = read_phrases_from_archive(tmp_path / "a.zip", "SST-2/train.tsv", 2)
    assert found == (["fine"], [1])
    with pytest.raises(InvalidInput, match=r"expected SST-2/dev\.tsv"):
        read_phrases_from_archive(tmp_path / "a.zip", "SST-2/dev.tsv", 2)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "SST-2.zip").write_bytes(b"not a zip")
    with pytest.raises(InvalidInput, match="a damaged zip"):
        read_phrases_from_archive(tmp_path / "SST-2.zip", "SST-2/train.tsv", 2)
