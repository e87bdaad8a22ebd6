from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.problems.data_files import SHARED, needs_shared_data
from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import choose
from thalweg.problems.data.sst2 import SST2

TRAIN = "label\tsentence\n1\ta good film\n0\tbad\n1\twonderful\n"
DEV = "label\tcontent\n0\ta wonderful mess of a film\n"


def write(folder: Path, train: str = "train.tsv", dev: str = "dev.tsv") -> None:
    (folder / train).write_text(TRAIN)
    (folder / dev).write_text(DEV)


@pytest.mark.parametrize(
    "names", [("train.tsv", "dev.tsv"), ("sst2_train.tsv", "sst2_dev.tsv")], ids=str
)
def test_phrases_are_found_by_their_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, *names)
    samples = SST2(data_dir=str(tmp_path)).build()
    assert list(samples.train_inputs) == ["a good film", "bad", "wonderful"]
    assert samples.train_labels.tolist() == [1, 0, 1]
    assert samples.test_labels is not None
    assert samples.test_labels.tolist() == [0]


def test_the_glue_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "SST-2.zip", "w") as archive:
        archive.writestr("SST-2/train.tsv", TRAIN)
        archive.writestr("SST-2/dev.tsv", DEV)
    for given in (tmp_path, tmp_path / "SST-2.zip"):
        assert len(SST2(data_dir=str(given)).build().train_labels) == 3


def test_one_file_holds_the_training_phrases(tmp_path: Path) -> None:
    write(tmp_path)
    samples = SST2(data_dir=str(tmp_path / "train.tsv")).build()
    assert samples.test_inputs is None
    assert "no held-out phrases" in samples.notes[0]


def test_words_are_those_of_the_chosen_training_phrases(tmp_path: Path) -> None:
    write(tmp_path)
    data = SST2(data_dir=str(tmp_path))
    encoded = data.encode(choose(data.build(), "sst2", 2, False, None))
    assert encoded.vocabulary == 2 + 4
    np.testing.assert_array_equal(encoded.train_inputs, [[2, 3, 4], [5, 0, 0]])
    np.testing.assert_array_equal(encoded.test_inputs, [[2, 1, 1]])  # type: ignore[arg-type]


def test_phrases_are_cut_to_the_length_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    data = SST2(data_dir=str(tmp_path), max_length=2)
    assert np.shape(data.encode(data.build()).train_inputs) == (3, 2)
    wide = SST2(data_dir=str(tmp_path), max_length=20)
    assert np.shape(wide.encode(wide.build()).train_inputs) == (3, 3)


def test_a_vocabulary_file_gives_pieces(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\ngood\nfilm\nwonder\n##ful\n")
    data = SST2(data_dir=str(tmp_path), vocabulary_file=str(tmp_path / "vocab.txt"))
    encoded = data.encode(data.build())
    assert encoded.vocabulary == 7
    np.testing.assert_array_equal(encoded.train_inputs, [[2, 3, 4], [1, 0, 0], [5, 6, 0]])


def test_a_folder_without_phrases_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no training phrases, expected train\.tsv"):
        SST2(data_dir=str(tmp_path)).build()


@needs_shared_data
def test_the_real_phrases_are_read() -> None:
    samples = SST2(data_dir=str(SHARED)).build()
    assert len(samples.train_inputs) == 67349
    assert samples.test_inputs is not None
    assert len(samples.test_inputs) == 872
