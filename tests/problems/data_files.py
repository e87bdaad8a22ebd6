"""Small files in the formats of the data sets, made by the tests that read them."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
"""Real data beside the project, where there is any."""

needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no real data in ../shared/data beside the project"
)


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of unsigned bytes in IDX format."""
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.astype(np.uint8).tobytes())
    )


def images_and_labels(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey images (number, 28, 28) and labels that go round the ten classes."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, size=(number, 28, 28), dtype=np.uint8)
    return images, (np.arange(number) % 10).astype(np.uint8)


def write_mnist(folder: Path, part: str, number: int, compressed: bool = False) -> None:
    """The images and labels of one part ("train", "t10k"), in MNIST's own files."""
    images, labels = images_and_labels(number, seed=len(part))
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        if compressed:
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{part}-{name}-ubyte").write_bytes(content)


def cifar_bytes(number: int, first_label: int = 0) -> bytes:
    """Records of CIFAR-10's binary version; pixel values tell their channel, row and column."""
    channel, row, column = np.indices((3, 32, 32))
    image = (64 * channel + row + column).astype(np.uint8).tobytes()
    return b"".join(bytes([(first_label + i) % 10]) + image for i in range(number))


def cifar_archive(files: dict[str, bytes]) -> bytes:
    """A .tar.gz with these files in the folder of the official archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
