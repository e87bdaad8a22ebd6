"""Whatever is in a file or on the command line: it is read, or a documented error says why not.

Each reader is given what Hypothesis makes up: a good file with bytes changed, cut and repeated, or
values of any type in any place. The short form is part of every run; `make fuzz` gives each reader
ten minutes, or `THALWEG_FUZZ_SECONDS`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.problems.data_files import cifar_archive, cifar_bytes, idx_bytes
from thalweg.errors import ThalwegError
from thalweg.lab.config import builtin_specs, dump_spec, load_spec, parse_spec
from thalweg.lab.store.checkpoint import load_checkpoint, save_checkpoint
from thalweg.lab.store.folders import StudyFolder
from thalweg.lab.store.metrics import Column, MetricsWriter, read_metrics
from thalweg.lab.store.parameters import load_parameters
from thalweg.lab.store.status import Status, read_status, write_status
from thalweg.problems.data.readers.cifar_binary import read_cifar_archive
from thalweg.problems.data.readers.idx import read_idx
from thalweg.problems.data.readers.npz import read_npz
from thalweg.problems.data.readers.phrases import read_phrases, read_phrases_from_archive
from thalweg.problems.data.vocabulary import WordPieces

SHORT_EXAMPLES, LONG_EXAMPLES = 25, 500
LIMITS = "array_bytes=1e7 text_bytes=1e6 table_bytes=1e7 parameters_bytes=1e7"
PHRASES = b"label\tsentence\n1\tgood film\n0\tbad film\n"
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**64, 10**30, "unset", "off", "all", "con", "\x1b", "\0", "sgd", "mlp"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@dataclass(frozen=True)
class Change:
    """What is done to the bytes of a good file; places are fractions of its length."""

    flips: list[tuple[float, int]]
    cut: float
    repeat: tuple[float, float, int] | None

    def of(self, content: bytes) -> bytes:
        """The changed bytes."""
        changed = bytearray(content)
        for place, bits in self.flips:
            if changed:
                changed[int(place * (len(changed) - 1))] ^= bits
        if self.repeat is not None:
            start, end = sorted(int(place * len(changed)) for place in self.repeat[:2])
            changed[start:end] = changed[start:end] * self.repeat[2]
        return bytes(changed[: int(self.cut * len(changed))])


PLACES = st.floats(0, 1)
CHANGES = st.builds(
    Change,
    st.lists(st.tuples(PLACES, st.integers(1, 255)), max_size=6),
    st.just(1.0) | PLACES,
    st.none() | st.tuples(PLACES, PLACES, st.integers(0, 3)),
)


@cache
def good_files() -> dict[str, bytes]:
    """A small good file of each format."""
    packed, zipped, pickled, old = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, x=np.arange(12.0), y=np.arange(3))
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("SST-2/train.tsv", PHRASES)
    torch.save({"w": torch.ones(2, 3)}, pickled)
    torch.save({"w": torch.ones(2, 3)}, old, _use_new_zipfile_serialization=False)
    from safetensors.torch import save

    return {
        "npz": packed.getvalue(),
        "zip": zipped.getvalue(),
        "tar": cifar_archive({"data_batch_1.bin": cifar_bytes(1)}),
        "idx": idx_bytes(np.zeros((2, 3, 3), np.uint8)),
        "gz": gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8))),
        "tsv": PHRASES,
        "vocabulary": b"[PAD]\n[UNK]\nfilm\n##s\ngood\n",
        "safetensors": save({"w": torch.ones(2, 3)}),
        "pt": pickled.getvalue(),
        "pth": old.getvalue(),
        "toml": dump_spec(load_spec("digits")).encode(),
    }


READERS: dict[str, Callable[[Path], Any]] = {
    "npz": lambda path: read_npz(path, ("x",), ("y",)),
    "zip": lambda path: read_phrases_from_archive(path, "SST-2/train.tsv", 2),
    "tar": read_cifar_archive,
    "idx": read_idx,
    "gz": read_idx,
    "tsv": lambda path: read_phrases(path, 2),
    "vocabulary": WordPieces.from_file,
    "safetensors": load_parameters,
    "pt": load_parameters,
    "pth": load_parameters,
    "toml": load_spec,
}


@contextlib.contextmanager
def documented(allowed: type[BaseException] = ThalwegError):
    """Errors that are documented are fine, and say little."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except allowed as error:
        assert len(str(error)) < 20_000  # noqa: PT017
        assert "\x1b" not in str(error)  # noqa: PT017


def file_of(kind: str, change: Change) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(change.of(good_files()[kind]))
        with documented():
            READERS[kind](path)


def checkpoint(change: Change, name: str) -> None:
    """A file of a checkpoint, its manifest right about what it says, changed or not."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(folder, 1, {"w": torch.ones(4, 3).T}, {"phase": [0]})
        (path / name).write_bytes(change.of((path / name).read_bytes()))
        if name != "manifest.json":
            manifest = json.loads((path / "manifest.json").read_text())
            del manifest["sha256"]
            content = (path / name).read_bytes()
            found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["files"][name] = found
            digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))
        with documented():
            load_checkpoint(path)


def segment(change: Change) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = [Column("step", "integer"), Column("loss"), Column("eigenvalues", "vector")]
        with MetricsWriter(folder, columns) as writer:
            for step in range(3):
                writer.log({"loss": 0.5, "eigenvalues": [1.0, 2.0]}, step)
        path = next(folder.iterdir())
        path.write_bytes(change.of(path.read_bytes()))
        with documented():
            read_metrics(folder)


def json_of_a_run(values: tuple[dict[str, Any], Any, Change]) -> None:
    """Values of any type in a status, then any value in its place, then its bytes changed."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "status.json"
        write_status(path, Status("running"))
        good = json.loads(path.read_text())
        study = StudyFolder(Path(name))
        for content in (json.dumps({**good, **values[0]}), json.dumps(values[1])):
            for file in ("status.json", "verdicts.json", "env.json"):
                (Path(name) / file).write_bytes(values[2].of(content.encode()))
            for read in (partial(read_status, path), study.read_verdicts, study.environments):
                with documented():
                    read()


def keys() -> st.SearchStrategy[str]:
    names = ["problem", "phases", "branches", "seeds", "subspace.k", "subspace", "probes", "claims"]
    names += ["phases.0.optimizer", "phases.*.steps", "branches.a.starts_from", "name", "figures"]
    names += ["problem.data", "problem.model.hidden", "extends", "format", "phases.0.split", "lr"]
    names += ["branches.*.split.dominant", "threads", "device", "on", "like", "branches.a"]
    return st.sampled_from(names) | st.text(max_size=8)


def spec_values(values: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A built-in spec with values of any type by key path, and a spec of nothing else."""
    with documented():
        parse_spec(_small(), overrides=values[0])
    with documented():
        parse_spec({**_small(), **values[1]})


def words(given_words: list[str]) -> None:
    with documented():
        parse_spec(_small(), overrides=given_words)


@cache
def _small() -> dict[str, Any]:
    assert "digits" in builtin_specs()
    return load_spec("digits").model_dump(mode="json", exclude_none=True)


WORDS = st.lists(
    st.builds("--{}".format, keys())
    | st.text(max_size=12)
    | st.sampled_from(["[[[", "{a = 1}", "9" * 5000, "1,2", "unset", "0x" + "f" * 99, "=", "--=x"]),
    max_size=6,
)
SPECS = st.tuples(st.dictionaries(keys(), VALUES, max_size=3), st.dictionaries(keys(), VALUES))
STATUS_KEYS = st.sampled_from(["state", "step", "end_step", "seconds", "loss", "pid", "host"])
RUN_VALUES = st.tuples(st.dictionaries(STATUS_KEYS, VALUES), VALUES, CHANGES)
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    **{kind: (CHANGES, partial(file_of, kind)) for kind in READERS},
    "checkpoint tensors": (CHANGES, partial(checkpoint, name="tensors.safetensors")),
    "checkpoint state": (CHANGES, partial(checkpoint, name="state.json")),
    "checkpoint manifest": (CHANGES, partial(checkpoint, name="manifest.json")),
    "segment": (CHANGES, segment),
    "status": (RUN_VALUES, json_of_a_run),
    "spec values": (SPECS, spec_values),
    "overrides": (WORDS, words),
}


def fuzz(target: str, examples: int, seed: int | None = None) -> None:
    """Give a reader so many inputs; others at each call, or those of a seed."""
    strategy, function = TARGETS[target]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def tried(value: Any) -> None:
        function(value)

    tried() if seed is None else hypothesis.seed(seed)(tried)()


@pytest.mark.parametrize("target", TARGETS)
def test_anything_is_read_or_refused_as_documented(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THALWEG_LIMITS", LIMITS)
    fuzz(target, SHORT_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_anything_is_read_or_refused_as_documented_for_long(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THALWEG_LIMITS", LIMITS)
    end = time.monotonic() + float(os.environ.get("THALWEG_FUZZ_SECONDS", "20"))
    while time.monotonic() < end:
        fuzz(target, LONG_EXAMPLES)
