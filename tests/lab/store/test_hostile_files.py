"""Files of a study that are hostile or damaged: the documented errors, in little memory."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from tests.bounded import in_bounded_memory
from thalweg.errors import IntegrityError, InvalidInput, ThalwegError
from thalweg.lab.store import durable
from thalweg.lab.store.checkpoint import load_checkpoint, save_checkpoint
from thalweg.lab.store.folders import StudyFolder
from thalweg.lab.store.lock import locked
from thalweg.lab.store.metrics import list_segments, read_metrics, read_segment
from thalweg.lab.store.parameters import load_parameters
from thalweg.lab.store.status import Status, read_status, write_status
from thalweg.lab.store.tensors import load_tensors, save_tensors

NONSENSE = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    "[]",
    "{}",
    "null",
    '"text"',
    "NaN",
    b"\xff\xfe",
    b"",
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("content", NONSENSE, ids=lambda content: str(content[:20]))
def test_json_that_is_none_or_nested_is_damage(content: str | bytes, tmp_path: Path) -> None:
    study = StudyFolder(tmp_path)
    write(tmp_path / "spec.toml", "")
    for name, read in (
        ("status.json", lambda: read_status(tmp_path / "status.json")),
        ("verdicts.json", study.read_verdicts),
        ("env.json", study.environments),
    ):
        write(tmp_path / name, content)
        if (name, content) in (("verdicts.json", "[]"), ("env.json", "{}")):
            continue
        with pytest.raises(IntegrityError, match=name) as caught:
            read()
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        *({key: [1]} for key in ("state", "step", "end_step", "seconds", "loss", "message", "pid")),
        {"step": "3"},
        {"step": True},
        {"step": None},
        {"state": "unheard of"},
        {"loss": "many"},
        {"host": 3},
    ],
    ids=str,
)
def test_a_status_of_other_types_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_status(path, Status("running", step=3, loss=float("nan")))
    assert read_status(path) is not None
    write(path, json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(IntegrityError, match=r"status.json: damaged"):
        read_status(path)


def test_a_lock_that_holds_nonsense_still_says_that_it_is_held(tmp_path: Path) -> None:
    for content in ("[1]", "[" * 100_000, '{"pid": 1}', "9" * 5000):
        with locked(tmp_path):
            write(tmp_path / ".lock", content)
            with pytest.raises(InvalidInput, match="another process"), locked(tmp_path):
                pass


def test_verdicts_and_environments_have_the_types_that_are_read(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path)
    for content in ([1], [{"claim": 1, "outcome": "holds"}], [{"claim": "a"}], {"claim": "a"}):
        write(tmp_path / "verdicts.json", json.dumps(content))
        with pytest.raises(IntegrityError, match=r"verdicts.json"):
            study.read_verdicts()
    write(tmp_path / "verdicts.json", '[{"claim": "a", "outcome": "holds"}]')
    assert study.read_verdicts() == [{"claim": "a", "outcome": "holds"}]
    for content in ({"earlier": 3}, {"earlier": [3]}):
        write(tmp_path / "env.json", json.dumps(content))
        with pytest.raises(IntegrityError, match=r"env.json"):
            study.environments()


def test_json_above_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "env.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(IntegrityError, match="THALWEG_LIMITS=json_bytes=1099511627776"):
        durable.read_json(tmp_path / "env.json")


def manifest_of(path: Path, **change: Any) -> None:
    """Write a manifest whose digest is right, whatever it says."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest |= change
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


@pytest.mark.parametrize(
    "change", [{"files": []}, {"files": {"../../x": {}}}, {"step": "1"}, {"permanent": 3}], ids=str
)
def test_a_manifest_of_other_types_or_files_is_damage(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, 1, {"theta": torch.zeros(3)}, {"a": 1})
    manifest_of(path, **change)
    with pytest.raises(IntegrityError):
        load_checkpoint(path)


def safetensors_of(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("strides", [[10**12], [[1]], "1", {"0": 1}, [1, 1], [0], [-1], 3, ["a"]])
def test_strides_that_are_none_are_damage(strides: Any, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    metadata = {"strides": json.dumps({"x": strides})}
    content = safetensors_of({"__metadata__": metadata, "x": entry}, bytes(16))
    with pytest.raises(IntegrityError, match="damaged"):
        load_tensors(write(tmp_path / "x.safetensors", content))


def test_strides_come_back_in_every_order_of_dimensions(tmp_path: Path) -> None:
    one = torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1)
    save_tensors(tmp_path / "x.safetensors", {"x": one, "y": torch.randn(1, 3, 1, 2).mT})
    found = load_tensors(tmp_path / "x.safetensors")["x"]
    assert found.stride() == one.stride()
    assert torch.equal(found, one)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**24 + 1) + bytes(2**24 + 1),
        safetensors_of({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors_of({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_of({"x": 3}),
        b"",
        b"\x00" * 7,
    ],
    ids=lambda content: str(len(content)),
)
def test_headers_of_safetensors_that_lie_are_damage(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", content)
    for read in (load_tensors, load_parameters):
        with pytest.raises(IntegrityError):
            read(path)


def repacked(path: Path, to: Path, packing: int, data: bytes) -> None:
    """The same .pt file with other values, packed in another way."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", packing) as new:
        for info in old.infolist():
            content = data if info.filename.endswith("data/0") else old.read(info)
            new.writestr(info.filename, content)


@pytest.mark.slow
def test_parameters_that_unpack_to_gigabytes_are_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(2**22)}, tmp_path / "one.pt")
    bomb, short = tmp_path / "bomb.pt", tmp_path / "short.pt"
    repacked(tmp_path / "one.pt", bomb, zipfile.ZIP_DEFLATED, bytes(2**24))
    repacked(tmp_path / "one.pt", short, zipfile.ZIP_STORED, bytes(100))
    monkeypatch.setenv("THALWEG_LIMITS", "array_bytes=1e7")
    said = in_bounded_memory(
        "load_parameters(PATH)",
        bomb,
        "from thalweg.lab.store.parameters import load_parameters; import torch",
        extra=14,
    )
    assert "THALWEG_LIMITS=array_bytes=16777" in said
    monkeypatch.delenv("THALWEG_LIMITS")
    with pytest.raises(IntegrityError, match="record size"):
        load_parameters(short)
    repacked(tmp_path / "one.pt", tmp_path / "packed.pt", zipfile.ZIP_DEFLATED, bytes(2**24))
    assert load_parameters(tmp_path / "packed.pt")["w"].shape == (2**22,)


def test_flipped_bits_of_parameters_give_the_documented_errors(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    path = tmp_path / "b.pt"
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            load_parameters(path)
        except ThalwegError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


def segment_of(folder: Path, rows: int, first: int, last: int, **columns: Any) -> Path:
    table = pyarrow.table({"step": pyarrow.array(range(rows), pyarrow.int64()), **columns})
    names = {b"thalweg:columns": " ".join(table.schema.names).encode()}
    path = folder / f"segment-{first:08d}-{last:08d}.parquet"
    parquet.write_table(
        table.replace_schema_metadata(names), path, compression="zstd", use_dictionary=False
    )
    return path


def test_a_segment_has_no_more_rows_than_its_name_has_steps(tmp_path: Path) -> None:
    segment_of(tmp_path, 1000, 0, 9)
    with pytest.raises(IntegrityError, match="1,000 rows for the steps of its name"):
        read_metrics(tmp_path)


def test_a_segment_of_gigabytes_of_zeros_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """A list column of one row: 160 MB once unpacked, against a limit of 100."""
    offsets = pyarrow.array([0, 20_000_000], pyarrow.int32())
    zeros = pyarrow.Array.from_buffers(
        pyarrow.float64(), 20_000_000, [None, pyarrow.py_buffer(bytes(160_000_000))]
    )
    column = pyarrow.ListArray.from_arrays(offsets, zeros)
    path = segment_of(tmp_path, 1, 0, 0, values=column)
    assert path.stat().st_size < 2**20
    said = in_bounded_memory(
        "read_metrics(PATH)",
        tmp_path,
        "import os; os.environ['THALWEG_LIMITS'] = 'table_bytes=1e8'\n"
        "from thalweg.lab.store.metrics import read_metrics; import pyarrow.parquet",
        extra=100,
    )
    assert "IntegrityError" in said
    assert "THALWEG_LIMITS=table_bytes" in said


def test_a_segment_without_steps_is_damage(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1]}).replace_schema_metadata({b"thalweg:columns": b"a"})
    parquet.write_table(table, tmp_path / "segment-00000000-00000000.parquet")
    with pytest.raises(IntegrityError, match="damaged"):
        read_segment(list_segments(tmp_path)[0])
