from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.problems.data_files import SHARED, needs_shared_data
from thalweg.errors import InvalidInput
from thalweg.lab.config import load_spec
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import Problem, build_problem
from thalweg.problems.data import download
from thalweg.problems.data.text import TinyShakespeare, windows
from thalweg.problems.losses import CrossEntropy
from thalweg.problems.problem_spec import ProblemSpec

TEXT = "the quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def problem(file: Path, loss: str = "cross-entropy", **model: Any) -> Problem:
    settings = {"name": "language-model", "layers": 1, "width": 4, "heads": 2, **model}
    spec = {
        "data": {"name": "tinyshakespeare", "data_dir": str(file), "context": 6},
        "samples": 20,
        "test_samples": 3,
        "model": settings,
        "loss": loss,
    }
    return build_problem(ProblemSpec.model_validate(spec), 0, dtype=torch.float64)


def test_windows_follow_one_another_and_targets_are_the_next_characters() -> None:
    cut = windows(TEXT, 7)
    alphabet = sorted(set(TEXT))
    assert cut.vocabulary == len(alphabet)
    assert len(cut.inputs) == (len(TEXT) - 1) // 7
    assert "".join(alphabet[i] for i in cut.inputs.ravel()) == TEXT[: cut.inputs.size]
    assert "".join(alphabet[i] for i in cut.targets.ravel()) == TEXT[1 : cut.inputs.size + 1]


@pytest.mark.parametrize(("length", "count"), [(1, 0), (3, 0), (4, 1), (6, 1), (7, 2)])
def test_a_window_needs_one_character_more_than_its_length(length: int, count: int) -> None:
    assert windows("abcdefg"[:length], 3).inputs.shape == (count, 3)


def test_the_last_windows_are_held_out(file: Path) -> None:
    samples = TinyShakespeare(data_dir=str(file), context=6, held_out=0.25).build()
    cut = windows(TEXT, 6)
    rest = round(0.25 * len(cut.inputs))
    np.testing.assert_array_equal(samples.train_inputs, cut.inputs[:-rest])
    np.testing.assert_array_equal(samples.test_inputs, cut.inputs[-rest:])  # type: ignore[arg-type]
    assert TinyShakespeare(data_dir=str(file), held_out=0.0).build().test_inputs is None


def test_a_folder_holds_the_file_under_one_of_its_names(file: Path, tmp_path: Path) -> None:
    by_folder = TinyShakespeare(data_dir=str(tmp_path)).build()
    by_file = TinyShakespeare(data_dir=str(file)).build()
    np.testing.assert_array_equal(by_folder.train_inputs, by_file.train_inputs)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "no text, expected input.txt or tinyshakespeare.txt; give the text file"),
        (b"", {}, "found no text; give a file that holds some"),
        (b"abc\xff", {}, "byte 3 that is not UTF-8"),
        (b"abcd", {"context": 4}, "expected a window of 4 characters and one more"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_mend(
    tmp_path: Path, content: bytes | None, settings: dict, message: str
) -> None:
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        TinyShakespeare(data_dir=str(tmp_path), **settings).build()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist; give the folder or file of Tiny"):
        TinyShakespeare(data_dir=str(tmp_path / "none.txt")).build()


def test_an_even_guess_costs_the_logarithm_of_the_alphabet(file: Path) -> None:
    built = problem(file)
    inputs, targets = built.train
    assert inputs.shape == targets.shape == (20, 6)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    loss = float(built.loss(built.model(inputs), targets).detach())
    assert loss == pytest.approx(math.log(len(set(TEXT))), rel=0.01)


def test_the_loss_is_the_mean_over_windows_of_the_mean_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (3, 5), generator=generator)
    each = [-output[i].log_softmax(-1)[torch.arange(5), targets[i]].mean() for i in range(3)]
    torch.testing.assert_close(CrossEntropy()(output, targets), torch.stack(each).mean())


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 5, 4)])
def test_outputs_without_a_target_each_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="each row of outputs needs one class"):
        CrossEntropy()(torch.zeros(3, 5, 4), torch.zeros(shape, dtype=torch.int64))


def test_accuracy_is_the_share_of_characters_and_squares_have_one_hot_characters(
    file: Path,
) -> None:
    entropy, squares = problem(file), problem(file, "mse")
    targets, one_hot = entropy.train[1], squares.train[1]
    assert torch.equal(one_hot.argmax(-1), targets)
    right = one_hot.clone()
    right[:5] = -right[:5]
    assert float(entropy.accuracy(right, targets)) == pytest.approx(0.75)
    assert float(squares.accuracy(right, one_hot)) == pytest.approx(0.75)


def test_no_token_sees_those_after_it(file: Path) -> None:
    model = problem(file).model
    ids = torch.arange(6)[None]
    changed = ids.clone()
    changed[0, 3:] = 0
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])


def test_order_matters_to_what_comes_after(file: Path) -> None:
    model = problem(file).model
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    assert not torch.allclose(model(one)[0, 2], model(other)[0, 2], rtol=1e-9)


def test_a_tied_head_is_the_token_embedding(file: Path) -> None:
    free, tied = problem(file), problem(file, tied_head=True)
    numbers = [sum(p.numel() for p in built.model.parameters()) for built in (free, tied)]
    assert numbers[0] - numbers[1] == 4 * len(set(TEXT))
    assert "head.weight" not in dict(tied.model.named_parameters())


def test_a_product_with_the_hessian_is_the_difference_of_gradients(file: Path) -> None:
    built = problem(file)
    objective = Objective(built.model, built.loss, built.train)
    theta = objective.theta()
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    product = Hessian(objective, theta) @ direction
    sides = [objective.gradient(theta + step * direction) for step in (1e-6, -1e-6)]
    expected = (sides[0] - sides[1]) / 2e-6
    assert (product - expected).norm() < 1e-6 * expected.norm()


def test_data_that_predict_no_tokens_are_refused() -> None:
    from thalweg.problems.data.dataset import InputShape
    from thalweg.problems.models.language_model import LanguageModel

    with pytest.raises(InvalidInput, match="choose data set tinyshakespeare"):
        LanguageModel().build(InputShape((8,), 30), 2)
    with pytest.raises(InvalidInput, match="inputs are numbers"):
        LanguageModel().build(InputShape((8,)), 2)


@needs_shared_data
def test_the_real_file_is_the_published_one_and_the_built_in_problem_reads_it() -> None:
    content = (SHARED / "tinyshakespeare.txt").read_bytes()
    assert download.TINY_SHAKESPEARE.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
    spec = load_spec("tinyshakespeare", {"problem.data.data_dir": str(SHARED)})
    built = build_problem(spec.problem, 0)
    assert (built.num_samples, built.num_classes) == (500, 65)
    assert built.train[0].shape == (500, 64)
