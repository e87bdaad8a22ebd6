from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.problems.data_files import idx_bytes
from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.idx import read_idx

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_a_plain_file_gives_the_array_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(ARRAY))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), ARRAY)


def test_a_compressed_file_gives_the_array_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx_bytes(ARRAY)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), ARRAY)


@pytest.mark.parametrize("cut", [0, 3, 9, 20])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    (tmp_path / "images").write_bytes(idx_bytes(ARRAY)[:cut])
    with pytest.raises(InvalidInput, match=r"images: found .*, expected .*; "):
        read_idx(tmp_path / "images")


def test_bytes_too_many_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(ARRAY) + b"x")
    with pytest.raises(InvalidInput, match="found more bytes, expected 24"):
        read_idx(tmp_path / "a")


def test_truncated_compressed_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx_bytes(ARRAY))[:-12])
    with pytest.raises(InvalidInput, match="damaged gzip data"):
        read_idx(tmp_path / "a.gz")


@pytest.mark.parametrize("position", [0, 12, -6])
def test_a_changed_compressed_byte_is_refused(tmp_path: Path, position: int) -> None:
    content = bytearray(gzip.compress(idx_bytes(ARRAY)))
    content[position] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.gz"):
        read_idx(tmp_path / "a.gz")


def test_a_claim_of_16_gigabytes_is_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes((0, 0, 8, 2)) + struct.pack(">II", 1 << 20, 1 << 14))
    with pytest.raises(InvalidInput, match="17,179,869,184 bytes"):
        read_idx(tmp_path / "a")


@pytest.mark.parametrize("magic", [b"\0\0\x0d\1", b"\0\0\x08\0", b"\0\0\x08\xff", b"PK\3\4"])
def test_another_type_or_format_is_refused(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "a").write_bytes(magic + bytes(2000))
    with pytest.raises(InvalidInput, match="first bytes"):
        read_idx(tmp_path / "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere: found No such file"):
        read_idx(tmp_path / "nowhere")
