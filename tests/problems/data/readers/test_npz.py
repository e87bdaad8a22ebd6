from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.npz import read_npz


def write_header(path: Path, descr: str, shape: tuple[int, ...], body: bytes = b"") -> None:
    """An npz whose array `x` has this header, whatever follows."""
    header = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + body)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "<i8", ">f4", "bool"])
def test_arrays_come_back_as_written(tmp_path: Path, order: str, dtype: str) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
    np.savez_compressed(tmp_path / "a.npz", x=array)
    read = read_npz(tmp_path / "a.npz", ("x",))["x"]
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


def test_optional_arrays_may_be_absent(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3), z=np.ones(2))
    assert set(read_npz(tmp_path / "a.npz", ("x",), ("y", "z"))) == {"x", "z"}


def test_a_missing_array_is_named_with_those_there_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones(3))
    with pytest.raises(InvalidInput, match="found arrays images, expected arrays x; add x"):
        read_npz(tmp_path / "a.npz", ("x",))


def test_a_claim_of_16_gigabytes_is_refused_before_memory_is_allocated(tmp_path: Path) -> None:
    write_header(tmp_path / "a.npz", "<f8", (1 << 31,))
    assert (tmp_path / "a.npz").stat().st_size < 400
    with pytest.raises(
        InvalidInput, match="17,179,869,184 bytes of data, expected at most 1,073,741,824"
    ):
        read_npz(tmp_path / "a.npz", ("x",))


def test_python_objects_are_refused_without_unpickling(tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> tuple:
            return pytest.fail, ("the pickle was run",)

    np.savez(tmp_path / "a.npz", x=np.array([Dangerous()], dtype=object))
    with pytest.raises(InvalidInput, match="array x: found Python objects, expected numbers"):
        read_npz(tmp_path / "a.npz", ("x",))


def test_text_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array(["a"]))
    with pytest.raises(InvalidInput, match="expected numbers"):
        read_npz(tmp_path / "a.npz", ("x",))


@pytest.mark.parametrize("shape", [(5,), (-1,), (-2, -2)])
def test_a_header_that_does_not_fit_its_values_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    write_header(tmp_path / "a.npz", "|u1", shape, b"1234")
    with pytest.raises(InvalidInput, match="array x"):
        read_npz(tmp_path / "a.npz", ("x",))


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"not an array")
    with pytest.raises(InvalidInput, match="a bad header"):
        read_npz(tmp_path / "a.npz", ("x",))


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    np.savez(tmp_path / "whole.npz", x=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:cut])
    with pytest.raises(InvalidInput, match=r"cut\.npz: found a damaged zip"):
        read_npz(tmp_path / "cut.npz", ("x",))


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[2000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InvalidInput, match="damaged zip"):
        read_npz(tmp_path / "a.npz", ("x",))
