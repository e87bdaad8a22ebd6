from __future__ import annotations

from pathlib import Path

import pytest

from thalweg.errors import InvalidInput
from thalweg.problems.data.vocabulary import UNKNOWN, WordPieces, WordVocabulary, padded


def pieces(tmp_path: Path, *lines: str) -> WordPieces:
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    return WordPieces.from_file(tmp_path / "vocab.txt")


def test_words_are_numbered_in_the_order_of_their_appearance() -> None:
    vocabulary = WordVocabulary.of(["a good film", "a bad film ."])
    assert vocabulary.size == 7
    assert vocabulary.encode("film a . superb") == [4, 2, 6, UNKNOWN]


def test_the_longest_piece_from_the_left_is_taken(tmp_path: Path) -> None:
    vocabulary = pieces(
        tmp_path, "[PAD]", "[UNK]", "un", "unaff", "##able", "##aff", "##a", "##ble"
    )
    names = {number: piece for piece, number in vocabulary.ids.items()}
    ids = vocabulary.encode("unaffable unable")
    assert [names[i] for i in ids] == ["unaff", "##able", "un", "##able"]


def test_a_word_that_cannot_be_cut_is_one_unknown(tmp_path: Path) -> None:
    vocabulary = pieces(tmp_path, "good", "##ness")
    assert vocabulary.encode("good goods goodness") == [2, UNKNOWN, 2, 3]


def test_padding_and_unknown_are_counted_once(tmp_path: Path) -> None:
    vocabulary = pieces(tmp_path, "[PAD]", "[UNK]", "[CLS]", "good", "good", "")
    assert vocabulary.size == 4
    assert min(vocabulary.ids.values()) == 2
    assert max(vocabulary.ids.values()) == vocabulary.size - 1


def test_case_is_lowered_when_the_vocabulary_has_no_upper_case(tmp_path: Path) -> None:
    assert pieces(tmp_path, "[CLS]", "good").encode("Good") == [3]
    assert pieces(tmp_path, "good", "Bad").encode("Good Bad") == [UNKNOWN, 3]


def test_texts_are_padded_and_cut() -> None:
    assert padded([[5], [5, 6, 7, 8], []], 3).tolist() == [[5, 0, 0], [5, 6, 7], [UNKNOWN, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"[PAD]\n\n", b"\xff\xfe"])
def test_a_file_without_tokens_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"vocab\.txt: found"):
        WordPieces.from_file(tmp_path / "vocab.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere: found No such file"):
        WordPieces.from_file(tmp_path / "nowhere")
