"""How much disk will a run take, and is there room for it? Said before time is spent."""

from __future__ import annotations

from pathlib import Path

from thalweg.errors import ThalwegError
from thalweg.lab.store.durable import format_bytes, free_bytes

_KEPT_FILES = 100_000  # spec, status, log, manifests: some kilobytes each
_ROW_BYTES = 8


def estimate_disk(
    num_parameters: int,
    k: int,
    optimizer_slots: int,
    checkpoints_kept: int,
    rows: int,
    columns: int,
    save_bases: int = 0,
    *,
    bases_per_checkpoint: int = 3,
    bytes_per_number: int = 4,
) -> int:
    """Estimate the bytes that a run leaves, from above: Parquet's compression is not counted.

    Args:
        num_parameters: P.
        k: size of the dominant subspace.
        optimizer_slots: vectors of length P that the optimizer keeps (SGD 0, momentum 1, Adam 2).
        checkpoints_kept: last ones and permanent ones. One more is counted, being written.
        rows: measured steps.
        columns: numbers a row; a vector of length k counts as k.
        save_bases: how many bases (P, k) are saved on request.
        bases_per_checkpoint: blocks (P, k) in the tracker's state: basis, its product over all
            samples, its product over the small sample.
        bytes_per_number: 4 for float32.
    """
    vectors = 1 + optimizer_slots + bases_per_checkpoint * k
    checkpoints = (checkpoints_kept + 1) * vectors * num_parameters * bytes_per_number
    bases = save_bases * k * num_parameters * bytes_per_number
    # Twice: while segments are merged, the old ones and the new one are there.
    metrics = 2 * rows * columns * _ROW_BYTES
    return checkpoints + bases + metrics + _KEPT_FILES


def check_disk(folder: Path, needed: int) -> str:
    """Return a sentence on the space that will be taken and is free.

    Raises:
        ThalwegError: less than `needed` bytes are free.
    """
    free = free_bytes(folder)
    sentence = f"{folder}: up to {format_bytes(needed)} will be written, {format_bytes(free)} free"
    if free < needed:
        raise ThalwegError(
            f"{sentence}; make room, choose another folder, or keep fewer checkpoints and bases"
        )
    return sentence
