from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.problems.data_files import (
    SHARED,
    cifar_archive,
    cifar_bytes,
    images_and_labels,
    needs_shared_data,
    write_mnist,
)
from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.images import CIFAR10, MNIST, FashionMNIST


def sizes(samples: Samples) -> tuple[int, int]:
    test = samples.test_labels
    return len(samples.train_labels), 0 if test is None else len(test)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_mnist_is_read_from_its_own_files(tmp_path: Path, compressed: bool, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_mnist(tmp_path / folder, "train", 30, compressed)
    write_mnist(tmp_path / folder, "t10k", 20, compressed)
    samples = MNIST(data_dir=str(tmp_path)).build()
    images, labels = images_and_labels(30, seed=len("train"))
    np.testing.assert_array_equal(samples.train_inputs, images[:, None])
    np.testing.assert_array_equal(samples.train_labels, labels)
    assert sizes(samples) == (30, 20)
    assert samples.scale == 255
    assert samples.notes == ()


def test_the_path_of_one_idx_file_stands_for_its_folder(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 30)
    write_mnist(tmp_path, "t10k", 20)
    given = tmp_path / "train-images-idx3-ubyte"
    assert sizes(MNIST(data_dir=str(given)).build()) == (30, 20)


def test_test_images_alone_are_split_in_halves_with_a_note(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 41)
    samples = MNIST(data_dir=str(tmp_path)).build()
    assert sizes(samples) == (20, 21)
    assert "first 20 serve for training, the other 21 are held out" in samples.notes[0]


def test_training_images_alone_are_enough(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 30)
    assert sizes(MNIST(data_dir=str(tmp_path)).build()) == (30, 0)


def test_the_files_of_another_data_set_are_noticed(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 10)
    labels = bytes([7, 2, 1, 0, 4, 1, 4, 9, 5, 9])  # how MNIST's test labels begin
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + labels)
    assert sizes(MNIST(data_dir=str(tmp_path)).build()) == (5, 5)
    with pytest.raises(InvalidInput, match="the labels of another data set"):
        FashionMNIST(data_dir=str(tmp_path)).build()


@pytest.mark.parametrize("axis", [None, 1, 3])
def test_an_npz_is_read_whichever_axis_the_channel_is(tmp_path: Path, axis: int | None) -> None:
    images, labels = images_and_labels(12)
    stored = images if axis is None else np.expand_dims(images, axis)
    np.savez(tmp_path / "mnist_small.npz", x_train=stored, y_train=labels[:, None])
    for given in (tmp_path, tmp_path / "mnist_small.npz"):
        samples = MNIST(data_dir=str(given)).build()
        np.testing.assert_array_equal(samples.train_inputs, images[:, None])
        assert sizes(samples) == (12, 0)


def test_colour_channels_last_become_first(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_x.npz", x_train=images, y_train=np.arange(6))
    samples = CIFAR10(data_dir=str(tmp_path)).build()
    np.testing.assert_array_equal(np.asarray(samples.train_inputs)[:, 2], images[..., 2])


def test_several_npz_files_are_refused_by_name(tmp_path: Path) -> None:
    images, labels = images_and_labels(12)
    for name in ("mnist_a.npz", "mnist_b.npz"):
        np.savez(tmp_path / name, x_train=images, y_train=labels)
    with pytest.raises(InvalidInput, match=r"mnist_a\.npz, mnist_b\.npz, expected one of them"):
        MNIST(data_dir=str(tmp_path)).build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 28, 28))}, "float64, expected uint8"),
        ({"x_train": np.zeros((12, 28), np.uint8)}, r"shape \(12, 28\)"),
        ({"y_train": np.full(12, 10)}, "labels from 10 to 10, expected 0 to 9"),
        ({"y_train": np.arange(11)}, r"shape \(11,\)"),
        ({"y_train": np.zeros(12)}, "of float64"),
        ({"x_test": np.zeros((2, 8, 8), np.uint8), "y_test": np.arange(2)}, "they must agree"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    images, labels = images_and_labels(12)
    arrays = {"x_train": images, "y_train": labels} | changes
    np.savez(tmp_path / "mnist.npz", allow_pickle=False, **arrays)
    with pytest.raises(InvalidInput, match=message):
        MNIST(data_dir=str(tmp_path)).build()


def test_labels_for_another_number_of_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 30)
    (tmp_path / "other").mkdir()
    write_mnist(tmp_path / "other", "train", 31)
    (tmp_path / "other/train-labels-idx1-ubyte").replace(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(InvalidInput, match=r"labels-idx1-ubyte: found shape \(31,\)"):
        MNIST(data_dir=str(tmp_path)).build()


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 30)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InvalidInput, match="add the file of labels"):
        MNIST(data_dir=str(tmp_path)).build()


@pytest.mark.parametrize("data_set", [MNIST, FashionMNIST, CIFAR10])
def test_a_folder_without_the_data_says_what_is_looked_for(
    tmp_path: Path, data_set: type[MNIST | FashionMNIST | CIFAR10]
) -> None:
    with pytest.raises(InvalidInput, match=r"no file of this data set, expected .*npz"):
        data_set(data_dir=str(tmp_path)).build()
    with pytest.raises(InvalidInput, match="does not exist"):
        data_set(data_dir=str(tmp_path / "nowhere")).build()
    with pytest.raises(InvalidInput, match="cannot be read"):
        data_set(data_dir="x" * 5000).build()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidInput, match=r"notes\.txt"):
        data_set(data_dir=str(tmp_path / "notes.txt")).build()


def test_cifar_is_read_from_its_binary_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(cifar_bytes(4, first_label=number))
    (folder / "test_batch.bin").write_bytes(cifar_bytes(3))
    for given in (tmp_path, folder):
        samples = CIFAR10(data_dir=str(given)).build()
        assert sizes(samples) == (20, 3)
        assert samples.train_labels[:8].tolist() == [1, 2, 3, 4, 2, 3, 4, 5]
        assert samples.notes == ()


def test_some_of_the_training_files_are_enough_and_noted(tmp_path: Path) -> None:
    (tmp_path / "data_batch_2.bin").write_bytes(cifar_bytes(4))
    samples = CIFAR10(data_dir=str(tmp_path)).build()
    assert sizes(samples) == (4, 0)
    assert samples.notes[0].startswith("CIFAR-10 without data_batch_1.bin, data_batch_3.bin")


def test_cifar_is_read_from_its_archive(tmp_path: Path) -> None:
    files = {"data_batch_1.bin": cifar_bytes(4), "test_batch.bin": cifar_bytes(2)}
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(cifar_archive(files))
    for given in (tmp_path, tmp_path / "cifar-10-binary.tar.gz"):
        assert sizes(CIFAR10(data_dir=str(given)).build()) == (4, 2)


def test_the_pickles_of_cifar_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InvalidInput, match=r"the python version \(pickles, not read\)"):
        CIFAR10(data_dir=str(tmp_path)).build()


def test_the_files_at_fault_are_only_test_files(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(cifar_bytes(4))
    with pytest.raises(InvalidInput, match="add the training files"):
        CIFAR10(data_dir=str(tmp_path)).build()


@needs_shared_data
def test_the_real_data_are_read() -> None:
    mnist = MNIST(data_dir=str(SHARED)).build()
    assert sizes(mnist) == (5000, 5000)
    idx = MNIST(data_dir=str(SHARED / "t10k-images-idx3-ubyte.gz")).build()
    assert sizes(idx) == (5000, 5000)
    assert idx.train_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(mnist.train_labels).sum() == 5000
    cifar = CIFAR10(data_dir=str(SHARED)).build()
    assert np.asarray(cifar.train_inputs).shape == (10000, 3, 32, 32)
    assert np.bincount(cifar.train_labels).tolist() == [1000] * 10
