"""A checkpoint is there whole or not at all, is checked before use, and restores bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from thalweg.errors import IntegrityError, InvalidInput, ThalwegError
from thalweg.lab.store import durable
from thalweg.lab.store.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from thalweg.lab.store.packing import pack_state, unpack_state
from thalweg.lab.store.parameters import load_parameters

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def same(left: Any, right: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.stride() == right.stride()
            and bytes_of(left) == bytes_of(right)
        )
    if isinstance(left, dict):
        return list(map(repr, left)) == list(map(repr, right)) and all(
            same(a, b) for a, b in zip(left.values(), right.values(), strict=True)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


def through_disk(folder: Path, nested: Any) -> Any:
    tensors, state = pack_state(nested)
    checkpoint = load_checkpoint(save_checkpoint(folder, 1, tensors, state))
    return unpack_state(checkpoint.tensors, checkpoint.state)


def save_steps(folder: Path, *steps: int, **options: Any) -> None:
    for step in steps:
        save_checkpoint(folder, step, {"theta": torch.full((8,), float(step))}, {}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 256, (3, 5, 8), generator=torch.Generator().manual_seed(0))
    value = bits.to(dtype) if dtype == torch.bool else bits.to(torch.uint8).view(dtype)
    assert same(through_disk(tmp_path, value), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(15.0).view(3, 5).T,
        torch.linalg.qr(torch.arange(12.0).view(4, 3).cos())[0],
        torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.arange(6.0).as_strided((1, 6), (99, 1)),
        torch.tensor(3.5),
        torch.zeros(0),
        torch.zeros(3, 0),
        torch.arange(20.0)[5:9],
        torch.nn.Parameter(torch.ones(2)).detach(),
    ],
    ids=["transposed", "qr", "channels last", "odd stride", "0-dim", "empty", "3x0", "view", "par"],
)
def test_shape_and_strides_come_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    found = through_disk(tmp_path, tensor)
    assert same(found, tensor)


def test_restored_memory_is_aligned_as_torch_aligns_its_own(tmp_path: Path) -> None:
    found = through_disk(tmp_path, [torch.ones(n) for n in (1, 3, 5, 7)])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found)


@pytest.mark.parametrize(
    "tensor", [torch.arange(12.0).view(3, 4)[:, :2], torch.ones(3, 1).expand(3, 4)]
)
def test_gaps_and_overlaps_are_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(InvalidInput, match=r"basis.*contiguous\(\)"):
        save_checkpoint(tmp_path, 2, {"basis": tensor}, {})
    assert names(tmp_path) == ["step-00000001"]


def test_tensors_that_share_memory_are_saved_once_each(tmp_path: Path) -> None:
    theta = torch.arange(6.0)
    state = {"theta": theta, "head": theta[:2], "tail": theta[2:], "tied": theta}
    found = through_disk(tmp_path, state)
    assert same(found, state)
    found["head"].zero_()
    assert same(found["theta"], theta)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()]
)
def test_a_tensor_that_cannot_be_stored_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="checkpoint tensor"):
        save_checkpoint(tmp_path, 1, {"z": tensor}, {})
    assert names(tmp_path) == []


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
tensors_of_any_shape = hypothesis_numpy.arrays(
    "float32", hypothesis_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
).map(torch.as_tensor)
keys = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.just("__tuple__"),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
nested_states = st.recursive(
    scalars | tensors_of_any_shape,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(nested_states)
def test_any_nested_state_survives_packing_and_json(nested: Any) -> None:
    tensors, state = pack_state(nested)
    assert same(unpack_state(tensors, json.loads(json.dumps(state, allow_nan=False))), nested)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, {2}]}, "state a/1: got 'set'"),
        ({"a": torch.float32}, "state a: got 'dtype'"),
        ({"a": b"x"}, "state a: got 'bytes'"),
        ({torch.ones(1): 1}, "a tensor cannot be a dictionary's key"),
    ],
)
def test_what_cannot_be_packed_is_named_by_path_and_type(value: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        pack_state(value)


def test_state_and_tensors_that_do_not_belong_together_are_noticed() -> None:
    _, state = pack_state({"a": torch.ones(1)})
    with pytest.raises(IntegrityError, match="do not belong together"):
        unpack_state({}, state)


@pytest.mark.parametrize("state", [{1: 2}, {"a": (1, 2)}, {"a": math.nan}, {"a": torch.ones(1)}])
def test_a_state_that_json_would_change_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(InvalidInput, match="pack_state"):
        save_checkpoint(tmp_path, 1, {}, state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3),
    ],
    ids=["momentum", "sgd", "adam", "adamw"],
)
def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path: Path, make: Any) -> None:
    def build() -> tuple[torch.nn.Module, Any, torch.Generator]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, make(model.parameters()), torch.Generator().manual_seed(5)

    def train(model: torch.nn.Module, optimizer: Any, generator: torch.Generator) -> None:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
            optimizer.step()

    model, optimizer, generator = build()
    train(model, optimizer, generator)
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "python": random.Random(3).getstate(),
    }
    restored = through_disk(tmp_path, state)
    assert same(restored, state)
    train(model, optimizer, generator)

    other, other_optimizer, other_generator = build()
    other.load_state_dict(restored["model"])
    other_optimizer.load_state_dict(restored["optimizer"])
    other_generator.set_state(restored["generator"])
    train(other, other_optimizer, other_generator)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_last_few_and_the_permanent_ones_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    save_steps(tmp_path, 20, permanent=True)
    save_steps(tmp_path, 30, 40, 50)
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    save_steps(tmp_path, 60, keep=1)
    assert names(tmp_path) == ["step-00000020", "step-00000060"]


def test_a_permanent_checkpoint_saved_again_stays_permanent(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, permanent=True)
    save_steps(tmp_path, 10, 20, 30, keep=1)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"theta": torch.zeros(2)}, {"sitting": 1})
    save_checkpoint(tmp_path, 5, {"theta": torch.ones(2)}, {"sitting": 2})
    assert names(tmp_path) == ["step-00000005"]
    assert load_checkpoint(tmp_path / "step-00000005").state == {"sitting": 2}


@pytest.mark.parametrize("options", [{"step": -1}, {"step": 1, "keep": 0}])
def test_impossible_arguments_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="an integer >="):
        save_checkpoint(tmp_path, tensors={}, state={}, **options)


def test_no_checkpoint_yet_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(InvalidInput, match="step-00000007"):
        load_checkpoint(checkpoint_path(tmp_path, 7))


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    save_steps(tmp_path, 10, 20)
    path = tmp_path / "step-00000020" / file
    if damage == "flip":
        flip_a_bit(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        path.unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"
    assert "step-00000020" in caplog.text
    with pytest.raises(IntegrityError, match="step-00000020"):
        load_checkpoint(tmp_path / "step-00000020")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    path = tmp_path / "step-00000010" / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        # Blanks between the values are the one thing that may change without changing anything.
        with contextlib.suppress(ValueError):
            if json.loads(flipped) == json.loads(data):
                continue
        with pytest.raises(IntegrityError):
            load_checkpoint(path.parent)


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    for path in list_checkpoints(tmp_path):
        flip_a_bit(path / "tensors.safetensors")
    with pytest.raises(IntegrityError, match="all checkpoints are damaged"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_moved_to_another_step_is_noticed(tmp_path: Path) -> None:
    save_steps(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000011")
    with pytest.raises(IntegrityError, match="belongs to step 10"):
        load_checkpoint(tmp_path / "step-00000011")


class Killed(BaseException):
    """Stands for a kill: from one instant on no call reaches the disk any more."""


def die_at(patch: pytest.MonkeyPatch, instant: int) -> None:
    calls = itertools.count()

    def guarded(call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= instant:
                raise Killed
            return call(*arguments, **options)

        return wrapper

    for name in ("replace", "unlink", "mkdir"):
        patch.setattr(Path, name, guarded(getattr(Path, name)))
    for name in ("fsync", "rmdir", "unlink"):
        patch.setattr(os, name, guarded(getattr(os, name)))


@pytest.mark.parametrize("step", [20, 30], ids=["the same step again", "the next step"])
def test_a_good_checkpoint_is_there_whenever_saving_is_killed(tmp_path: Path, step: int) -> None:
    killed, instant = True, 0
    while killed:
        instant += 1
        folder = tmp_path / str(instant)
        save_steps(folder, 10, permanent=True)
        save_steps(folder, 20)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, instant)
            killed = True
            with contextlib.suppress(Killed):
                save_steps(folder, step, keep=1)
                killed = False
        path = latest_checkpoint(folder)
        assert path is not None
        assert load_checkpoint(path).step in (20, step)
        save_steps(folder, 40, keep=1)
        assert names(folder) == ["step-00000010", "step-00000040"]
    assert instant > 8


SAVE_FOREVER = """
import itertools, os, pathlib, random, signal, sys, time
import torch
from thalweg.lab.store.checkpoint import save_checkpoint
torch.set_num_threads(1)
instants = random.Random(11)
for attempt in range(6):
    folder = pathlib.Path(sys.argv[1]) / str(attempt)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        for step in itertools.count(1):
            save_checkpoint(folder / "checkpoints", step,
                            {"theta": torch.full((20000,), float(step))}, {"step": step})
            (folder / "said").write_text(str(step))
    time.sleep(0.02 + 0.1 * instants.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_while_saving_leaves_the_last_finished_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], check=True, timeout=60)
    finished = 0
    for folder in tmp_path.iterdir():
        text = (folder / "said").read_text() if (folder / "said").exists() else ""
        said = int(text or 0)
        finished += said
        path = latest_checkpoint(folder / "checkpoints")
        assert path is not None or said == 0
        if path is not None:
            checkpoint = load_checkpoint(path)
            assert checkpoint.step >= said
            assert checkpoint.state == {"step": checkpoint.step}
            assert checkpoint.tensors["theta"].eq(checkpoint.step).all()
    assert finished > 0


def test_a_disk_that_is_too_small_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    monkeypatch.setattr(durable, "free_bytes", lambda _: 1000)
    with pytest.raises(ThalwegError, match=r"disk full: .*4\.0 MB needed, 1\.0 kB free"):
        save_checkpoint(tmp_path, 2, {"theta": torch.zeros(1_000_000)}, {})
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_removes_the_half_written_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ThalwegError, match=f"disk full: {tmp_path / 'step-00000002'}: .* needed"
        ):
            save_steps(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    save_steps(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"


@pytest.fixture
def mounted(tmp_path: Path) -> Any:
    """A folder on a file system of one megabyte of its own, with a command to make it read-only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_real_disk_runs_full_without_harm(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(mounted, 1)
    large = {"theta": torch.zeros(400_000)}
    with pytest.raises(ThalwegError, match="disk full"):
        save_checkpoint(mounted, 2, large, {})
    with monkeypatch.context() as patch:  # the disk fills after the first look at it
        patch.setattr(durable, "free_bytes", lambda _: 10**9)
        with pytest.raises(ThalwegError, match="disk full"):
            save_checkpoint(mounted, 2, large, {})
    assert names(mounted) == ["step-00000001"]
    save_steps(mounted, 2)


def test_a_read_only_folder_is_named(mounted: Path) -> None:
    save_steps(mounted, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(InvalidInput, match=r"cannot be written to \(Read-only file system\)"):
        save_steps(mounted, 2)
    assert latest_checkpoint(mounted) == mounted / "step-00000001"


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(InvalidInput, match=r"cannot be written to \(Permission denied\)"):
        save_steps(tmp_path / "new", 1)


def test_own_parameters_are_read_from_the_usual_files(tmp_path: Path) -> None:
    import safetensors.torch

    model = torch.nn.Linear(3, 2)
    state = dict(model.state_dict())
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "c.pth")
    for name in ("a.safetensors", "b.pt", "c.pth"):
        found = load_parameters(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(same(found[key], state[key]) for key in state)


def test_a_file_that_would_run_code_is_refused_with_the_mend(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2), tmp_path / "model.pt")
    with pytest.raises(InvalidInput, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        load_parameters(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.bin", b"", InvalidInput, "a name ending in .safetensors, .pt or .pth"),
        ("missing.pt", None, InvalidInput, "an existing file"),
        ("a.safetensors", b"nonsense", IntegrityError, "damaged"),
        ("a.pt", b"", IntegrityError, "damaged"),
    ],
)
def test_an_unusable_file_of_parameters_is_named(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=said) as caught:
        load_parameters(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_of_other_things_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "a.pt")
    with pytest.raises(InvalidInput, match="epoch"):
        load_parameters(tmp_path / "a.pt")
