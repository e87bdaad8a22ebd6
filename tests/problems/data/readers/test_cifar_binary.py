from __future__ import annotations

from pathlib import Path

import pytest

from tests.problems.data_files import cifar_archive, cifar_bytes
from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.cifar_binary import (
    decode_cifar,
    read_cifar_archive,
    read_cifar_file,
)


def test_records_become_images_channel_first_and_labels() -> None:
    images, labels = decode_cifar("somewhere", cifar_bytes(12))
    assert images.shape == (12, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert images[5, 2, 3, 4] == 2 * 64 + 3 + 4


def test_an_archive_is_read_without_unpacking_it(tmp_path: Path) -> None:
    files = {"data_batch_1.bin": cifar_bytes(3), "readme.html": b"hello"}
    (tmp_path / "a.tar.gz").write_bytes(cifar_archive(files))
    found = read_cifar_archive(tmp_path / "a.tar.gz")
    assert list(found) == ["data_batch_1.bin"]
    assert len(found["data_batch_1.bin"][0]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("content", [b"", b"x" * 3072, cifar_bytes(2)[:-1]])
def test_a_file_of_no_whole_records_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"data_batch_1\.bin: found .* multiple of 3,073"):
        read_cifar_file(tmp_path / "data_batch_1.bin")


def test_a_label_above_9_is_refused_with_its_record(tmp_path: Path) -> None:
    content = bytearray(cifar_bytes(3))
    content[3073] = 77
    with pytest.raises(InvalidInput, match="label 77 in record 1"):
        decode_cifar("somewhere", bytes(content))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    whole = cifar_archive({"data_batch_1.bin": cifar_bytes(40)})
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"a\.tar\.gz"):
        read_cifar_archive(tmp_path / "a.tar.gz")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"no archive" * 100)
    with pytest.raises(InvalidInput, match="a damaged archive"):
        read_cifar_archive(tmp_path / "a.tar.gz")
