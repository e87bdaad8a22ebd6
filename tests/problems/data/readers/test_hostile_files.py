"""Small files that hold or claim gigabytes: every reader refuses them in little memory and time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bounded import in_bounded_memory
from tests.problems.data_files import cifar_archive, cifar_bytes
from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.cifar_binary import read_cifar_archive
from thalweg.problems.data.readers.idx import read_idx
from thalweg.problems.data.readers.npz import read_npz
from thalweg.problems.data.readers.phrases import (
    decode_phrases,
    read_phrases,
    read_phrases_from_archive,
)
from thalweg.problems.data.text import windows
from thalweg.problems.data.vocabulary import WordPieces, padded

READ: dict[str, Callable[[Path], Any]] = {
    "npz": lambda path: read_npz(path, ("x", "y")),
    "zip": lambda path: read_phrases_from_archive(path, "SST-2/train.tsv", 2),
    "tar": read_cifar_archive,
    "gz": read_idx,
    "tsv": lambda path: read_phrases(path, 2),
    "txt": WordPieces.from_file,
}
MEGABYTES = 2**20


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def zeros(shape: tuple[int, ...]) -> str:
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n"


def write_zip(path: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_bombs(folder: Path) -> None:
    """Files of at most a few hundred kilobytes, each of which would take a gigabyte or more."""
    half = npy(zeros((3 * 2**28,)), bytes(3 * 2**22))  # claims 805 MB, holds some
    write_zip(folder / "two-claims.npz", {"x.npy": half, "y.npy": half})
    write_zip(folder / "packed.npz", {"x.npy": half, "y.npy": half}, zipfile.ZIP_LZMA)
    write_zip(folder / "packed.zip", {"SST-2/train.tsv": bytes(2**26)}, zipfile.ZIP_BZIP2)
    liar = bytearray(zip_of_one("SST-2/train.tsv", bytes(2**26)))
    at = liar.rfind(b"PK\x01\x02")
    liar[at + 24 : at + 28] = struct.pack("<I", 100)  # says 100 bytes, holds 64 MB
    (folder / "lies.zip").write_bytes(liar)
    claim = bytearray(zip_of_one("SST-2/train.tsv", b"label\tsentence\n"))
    at = claim.rfind(b"PK\x01\x02")
    claim[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)
    (folder / "claims.zip").write_bytes(claim)
    write_zip(folder / "directory.zip", {str(n): b"" for n in range(20_000)})
    block = gzip.compress(bytes(2**24))
    small = gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 9)))
    (folder / "zeros.gz").write_bytes(small + block * 70)
    (folder / "claims.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + b"\xff" * 4))
    (folder / "description.tar").write_bytes(gzip.compress(extended_header(2**29)) + block)
    far = tarfile.TarInfo("a")
    far.size = 2**36
    (folder / "far.tar").write_bytes(far.tobuf() + bytes(1024))
    (folder / "xz.tar").write_bytes(lzma.compress(bytes(2**24)))
    (folder / "many.tar").write_bytes(bz2.compress(tarfile.TarInfo("a").tobuf() * 20_000))


def zip_of_one(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def extended_header(size: int) -> bytes:
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, size
    return header.tobuf(tarfile.USTAR_FORMAT)


def read_all(folder: Path) -> str:
    """What is said about each file of a folder."""
    said = []
    for path in sorted(folder.iterdir()):
        try:
            READ[path.suffix[1:]](path)
            said.append(f"{path.name}: read")
        except InvalidInput as error:
            said.append(str(error).replace(f"{folder}/", ""))
    return "\n".join(said)


@pytest.mark.slow
def test_bombs_are_refused_in_bounded_memory_and_time(tmp_path: Path) -> None:
    write_bombs(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3 * MEGABYTES
    begun = time.monotonic()
    said = in_bounded_memory(
        "print(test.read_all(PATH))",
        tmp_path,
        "import tests.problems.data.readers.test_hostile_files as test",
        extra=900,  # the largest allowed array and half of it
    ).splitlines()
    assert time.monotonic() - begun < 60
    assert len(said) == len(list(tmp_path.iterdir()))
    assert not [line for line in said if line.endswith(": read")]
    whole = "\n".join(said)
    assert "compression 14" in whole
    assert "compression 12" in whole
    assert "an xz archive" in whole
    assert "a description of" in whole
    assert "20,000 files" in whole
    assert whole.count("raise the limit: THALWEG_LIMITS=") >= 2
    assert "MemoryError" not in whole


@pytest.mark.parametrize(
    "header",
    [
        zeros((2**60, 2**60)),
        zeros((-1,)),
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True,)}\n",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1L,)}\n",
        "{'descr': ('<f4', (1000000000,)), 'fortran_order': False, 'shape': (1,)}\n",
        "{'descr': [('a', '<f4', 1000000000)], 'fortran_order': False, 'shape': (1,)}\n",
        "{'descr': 'O', 'fortran_order': False, 'shape': (1,)}\n",
        "{'descr': '|u1', 'fortran_order': 2, 'shape': (1,)}\n",
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'1,' * 65})}}\n",
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'9' * 5000},)}}\n",
        f"{{'descr': '|u1', 'fortran_order': False, 'shape': {'(' * 3000}{')' * 3000}}}\n",
        f"{'-' * 9000}1\n",
        "{1: 2, 'a': 3}\n",
        "[]\n",
        "\x00\n",
        "",
    ],
    ids=lambda header: header[:60],
)
def test_odd_headers_of_arrays_are_refused_in_one_line(header: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "a.npz", {"x.npy": npy(header)})
    with pytest.raises(InvalidInput, match="array x") as caught:
        read_npz(tmp_path / "a.npz", ("x",))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


def test_empty_arrays_are_read_whatever_their_other_dimensions(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.npz", {"x.npy": npy(zeros((0, 28, 28)))})
    assert read_npz(tmp_path / "a.npz", ("x",))["x"].shape == (0, 28, 28)


def test_a_label_of_thousands_of_digits_is_a_bad_label() -> None:
    with pytest.raises(InvalidInput, match="label '000"):
        decode_phrases("x.tsv", b"label\tsentence\n" + b"0" * 5000 + b"\tgood\n", 2)


def test_one_long_phrase_does_not_make_a_table_of_gigabytes() -> None:
    with pytest.raises(InvalidInput, match="array_bytes=80000000000"):
        padded([[1]] * 100_000, 100_000)


def test_a_token_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("a\n##a\n" + "a" * 10_000)
    with pytest.raises(InvalidInput, match="a token of 10,000 characters"):
        WordPieces.from_file(tmp_path / "vocabulary.txt")


def test_text_is_cut_into_the_windows_that_sorting_gives() -> None:
    text = "über\U0001f600 und ab " * 30
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, ids = np.unique(points, return_inverse=True)
    cut = windows(text, 7)
    assert cut.vocabulary == len(alphabet)
    np.testing.assert_array_equal(cut.inputs.reshape(-1), ids[: cut.inputs.size])
    np.testing.assert_array_equal(cut.targets.reshape(-1), ids[1 : cut.inputs.size + 1])
    assert cut.inputs.dtype == np.int64


def test_a_limit_that_is_raised_lets_more_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.tar").write_bytes(cifar_archive({"data_batch_1.bin": cifar_bytes(3)}))
    monkeypatch.setenv("THALWEG_LIMITS", "array_bytes=5000")
    with pytest.raises(InvalidInput, match="THALWEG_LIMITS=array_bytes"):
        read_cifar_archive(tmp_path / "c.tar")
    monkeypatch.setenv("THALWEG_LIMITS", "array_bytes=50000")
    assert len(read_cifar_archive(tmp_path / "c.tar")["data_batch_1.bin"][1]) == 3
