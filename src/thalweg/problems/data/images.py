"""Data sets of images that are read from files: MNIST, Fashion-MNIST, CIFAR-10.

Files are looked for in `data_dir` by their official names, or downloaded where it is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from thalweg.errors import InvalidInput
from thalweg.problems.data import download
from thalweg.problems.data.data_folder import existing, only_match
from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.readers.cifar_binary import (
    TEST_FILE,
    TRAIN_FILES,
    read_cifar_archive,
    read_cifar_file,
)
from thalweg.problems.data.readers.damage import check_size, unusable
from thalweg.problems.data.readers.idx import read_idx
from thalweg.problems.data.readers.npz import read_npz
from thalweg.registry import datasets
from thalweg.settings import Settings

Part = tuple[np.ndarray, np.ndarray]
"""Images (n, channels, height, width) uint8 and labels (n,) integers."""

_DATA_DIR = Field(default=None, description="folder or file of the data; downloaded if not given")


class _IdxImages(Settings):
    """What MNIST and Fashion-MNIST have in common: file names, sizes, formats."""

    data_dir: str | None = _DATA_DIR

    title: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    """Folders within `data_dir` that other programs put the files into."""
    archives: ClassVar[tuple[str, ...]]
    """Patterns of the names of npz files."""
    remote: ClassVar[Mapping[str, download.RemoteFile]]
    first_labels: ClassVar[Mapping[str, tuple[int, ...]]]
    """The first labels of another data set with the same file names, which give it away."""

    def build(self) -> Samples:
        if self.data_dir is None:
            paths = {n: download.fetch(f, self.registered_name) for n, f in self.remote.items()}
            return self._from_idx(paths)
        place = existing(self.data_dir, self.title)
        if place.is_file():
            return self._from_file(place)
        paths = self._idx_paths(place)
        if len(paths) == len(self.remote):
            return self._from_idx(paths)
        archive = only_match(place, self.archives)
        if archive is not None:
            return _from_npz(archive, channels=1, num_classes=10)
        if paths:
            return self._from_idx(paths)
        names = ", ".join(self.remote)
        raise unusable(
            place,
            "no file of this data set",
            f"{names} (each also .gz), or {' or '.join(self.archives)}",
            f"give the folder of {self.title}, or leave data_dir out to download it",
        )

    def _from_file(self, path: Path) -> Samples:
        if path.suffix == ".npz":
            return _from_npz(path, channels=1, num_classes=10)
        paths = self._idx_paths(path.parent)
        if path not in paths.values():
            expected = ".npz, or one of " + ", ".join(self.remote)
            raise unusable(path, "a file of another name", expected, "give the folder instead")
        return self._from_idx(paths)

    def _idx_paths(self, folder: Path) -> dict[str, Path]:
        """The IDX files there are, by official name."""
        paths: dict[str, Path] = {}
        for name in self.remote:
            dotted = name.replace("-idx", ".idx")  # as some programs unpack them
            for place in (folder, *(folder / sub for sub in self.folders)):
                for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
                    if name not in paths and (place / candidate).is_file():
                        paths[name] = place / candidate
        return paths

    def _from_idx(self, paths: Mapping[str, Path]) -> Samples:
        train, test = self._part(paths, "train"), self._part(paths, "t10k")
        if train is not None:
            return _image_samples(train, test, 10)
        if test is None:
            found = ", ".join(sorted(path.name for path in paths.values()))
            hint = "add the file of labels or of images that is missing"
            raise unusable(next(iter(paths.values())).parent, found, "images and labels", hint)
        images, labels = test
        half = len(labels) // 2
        note = (
            f"only the test images of {self.title} were found: the first {half:,} serve for "
            f"training, the other {len(labels) - half:,} are held out"
        )
        parts = (images[:half], labels[:half]), (images[half:], labels[half:])
        return _image_samples(*parts, 10, notes=(note,))

    def _part(self, paths: Mapping[str, Path], part: str) -> Part | None:
        images_path = paths.get(f"{part}-images-idx3-ubyte")
        labels_path = paths.get(f"{part}-labels-idx1-ubyte")
        if images_path is None or labels_path is None:
            return None
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim != 3:
            raise unusable(images_path, f"{images.ndim} dimensions", "3", "is it of images?")
        _check_labels(labels_path, labels, len(images), 10)
        if tuple(labels[:10].tolist()) == self.first_labels[part]:
            raise unusable(
                labels_path,
                "the labels of another data set with the same file names",
                f"those of {self.title}",
                "keep the two in folders of their own",
            )
        return images[:, None], labels


_MNIST_LABELS = {"train": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "t10k": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)}
_FASHION_LABELS = {"train": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5), "t10k": (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)}


@datasets.register("mnist")
class MNIST(_IdxImages):
    """MNIST: 60,000 training and 10,000 held-out digits of 28x28 pixels from 0 to 255.

    `data_dir` is a folder with the IDX files (plain or .gz) or an npz file (`mnist*.npz`, arrays
    x_train, y_train and maybe x_test, y_test), or such an npz file itself; without it the files are
    downloaded. Where there are only the test files (t10k), the first half serves for training.
    """

    title: ClassVar[str] = "MNIST"
    folders: ClassVar[tuple[str, ...]] = ("mnist", "MNIST/raw", "raw")
    archives: ClassVar[tuple[str, ...]] = ("mnist*.npz",)
    remote: ClassVar[Mapping[str, download.RemoteFile]] = download.MNIST
    first_labels: ClassVar[Mapping[str, tuple[int, ...]]] = _FASHION_LABELS


@datasets.register("fashion-mnist")
class FashionMNIST(_IdxImages):
    """Fashion-MNIST: 60,000 training and 10,000 held-out images of clothes, 28x28, 0 to 255.

    Files as for "mnist"; npz files are named `fashion*mnist*.npz`.
    """

    title: ClassVar[str] = "Fashion-MNIST"
    folders: ClassVar[tuple[str, ...]] = ("fashion-mnist", "FashionMNIST/raw", "raw")
    archives: ClassVar[tuple[str, ...]] = ("fashion*mnist*.npz",)
    remote: ClassVar[Mapping[str, download.RemoteFile]] = download.FASHION_MNIST
    first_labels: ClassVar[Mapping[str, tuple[int, ...]]] = _MNIST_LABELS


@datasets.register("cifar10")
class CIFAR10(Settings):
    """CIFAR-10: 50,000 training and 10,000 held-out colour images of 32x32 pixels, 0 to 255.

    `data_dir` is a folder with the files of the binary version (`data_batch_1.bin` to `_5.bin`,
    `test_batch.bin`), with `cifar-10-binary.tar.gz`, or with an npz file (`cifar10*.npz`, images
    channel last or first); or the archive or npz file itself. Without it the archive is downloaded.
    Some of the training files are enough. The "python version" holds pickles and is not read.
    """

    data_dir: str | None = _DATA_DIR

    def build(self) -> Samples:
        if self.data_dir is None:
            return self._from_archive(download.fetch(download.CIFAR10, self.registered_name))
        place = existing(self.data_dir, "CIFAR-10")
        if place.is_file():
            if place.suffix == ".npz":
                return _from_npz(place, channels=3, num_classes=10)
            return self._from_archive(place)
        for folder in (place, place / "cifar-10-batches-bin"):
            found = {n: folder / n for n in (*TRAIN_FILES, TEST_FILE) if (folder / n).is_file()}
            if found:
                return self._assemble(folder, {n: read_cifar_file(p) for n, p in found.items()})
        if (place / download.CIFAR10.name).is_file():
            return self._from_archive(place / download.CIFAR10.name)
        archive = only_match(place, ("cifar10*.npz", "cifar-10*.npz"))
        if archive is not None:
            return _from_npz(archive, channels=3, num_classes=10)
        pickles = (place / "cifar-10-batches-py").is_dir()
        raise unusable(
            place,
            "the python version (pickles, not read)" if pickles else "no file of this data set",
            f"data_batch_1.bin ..., {TEST_FILE}, {download.CIFAR10.name} or cifar10*.npz",
            "give the folder of CIFAR-10's binary version, or leave data_dir out to download it",
        )

    def _from_archive(self, path: Path) -> Samples:
        return self._assemble(path, read_cifar_archive(path))

    def _assemble(self, source: Path, parts: dict[str, Part]) -> Samples:
        train = [parts[name] for name in TRAIN_FILES if name in parts]
        if not train:
            found = ", ".join(sorted(parts)) or "none of the known files"
            raise unusable(source, found, "data_batch_1.bin ...", "add the training files")
        images = np.concatenate([part[0] for part in train])
        labels = np.concatenate([part[1] for part in train])
        missing = [name for name in (*TRAIN_FILES, TEST_FILE) if name not in parts]
        notes = (f"CIFAR-10 without {', '.join(missing)}",) if missing else ()
        return _image_samples((images, labels), parts.get(TEST_FILE), 10, notes)


# How arrays of images and labels become samples, and whether they fit together.


def _image_samples(
    train: Part, test: Part | None, num_classes: int, notes: tuple[str, ...] = ()
) -> Samples:
    """Samples of images whose values go from 0 to 255.

    Raises:
        InvalidInput: training and held-out images differ in shape.
    """
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise InvalidInput(
            f"training images of shape {train[0].shape[1:]} and held-out ones of "
            f"{test[0].shape[1:]}; they must agree"
        )
    return Samples(
        train_inputs=train[0],
        train_labels=train[1].astype(np.int64),
        num_classes=num_classes,
        test_inputs=None if test is None else test[0],
        test_labels=None if test is None else test[1].astype(np.int64),
        scale=255.0,
        notes=notes,
    )


def _from_npz(path: Path, channels: int, num_classes: int) -> Samples:
    """Samples from x_train, y_train and maybe x_test, y_test; images channel last or first.

    Raises:
        InvalidInput: as `read_npz`, or the arrays do not fit together.
    """
    arrays = read_npz(path, ("x_train", "y_train"), ("x_test", "y_test"))
    train = _part(path, "train", arrays["x_train"], arrays["y_train"], channels, num_classes)
    if "x_test" not in arrays or "y_test" not in arrays:
        return _image_samples(train, None, num_classes)
    test = _part(path, "test", arrays["x_test"], arrays["y_test"], channels, num_classes)
    return _image_samples(train, test, num_classes)


def _part(
    path: Path, part: str, images: np.ndarray, labels: np.ndarray, channels: int, num_classes: int
) -> Part:
    where = f"{path}, array x_{part}"
    if images.dtype != np.uint8:
        raise unusable(where, f"values of type {images.dtype}", "uint8", "save pixels 0 to 255")
    if labels.shape == (len(images), 1):  # as some programs save them
        labels = labels[:, 0]
    images = _channel_first(where, images, channels)
    _check_labels(f"{path}, array y_{part}", labels, len(images), num_classes)
    return images, labels


def _channel_first(where: str, images: np.ndarray, channels: int) -> np.ndarray:
    if images.ndim == 3 and channels == 1:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] == channels:
        return images
    if images.ndim == 4 and images.shape[3] == channels:
        return images.transpose(0, 3, 1, 2)
    expected = f"(n, height, width, {channels}) or (n, {channels}, height, width)"
    raise unusable(where, f"shape {images.shape}", expected, "give an array of images")


def _check_labels(where: Path | str, labels: np.ndarray, number: int, num_classes: int) -> None:
    """Refuse labels that are not one class number for each of `number` samples.

    Raises:
        InvalidInput: another shape or type, or a number outside 0 to num_classes - 1.
    """
    if labels.shape != (number,) or labels.dtype.kind not in "iu":
        found = f"shape {labels.shape} of {labels.dtype}"
        raise unusable(where, found, f"{number} integers", "give one label for each image")
    check_size(where, 8 * number)  # they become int64
    if number and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise unusable(where, found, f"0 to {num_classes - 1}", "is it the right data set?")
