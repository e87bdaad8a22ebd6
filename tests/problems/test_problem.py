from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

from tests.problems.data_files import SHARED, needs_shared_data, write_mnist
from thalweg.errors import InvalidInput
from thalweg.problems import Problem, Samples, build_problem
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.registry import datasets
from thalweg.settings import Settings


def spec(**changes: Any) -> ProblemSpec:
    given = {
        "data": "digits",
        "preprocess": "unit",
        "samples": 100,
        "test_samples": 20,
        "model": {"name": "mlp", "hidden": [8]},
        "loss": "mse",
    }
    return ProblemSpec.model_validate(given | changes)


def parameters(problem: Problem) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in problem.model.parameters()])


@datasets.register("test-curve")
class Curve(Settings):
    """Regression: y = x^2, one or two outputs."""

    outputs: int = Field(default=1, ge=1)

    def build(self) -> Samples:
        x = np.linspace(-1, 1, 20)
        y = x**2 if self.outputs == 1 else np.stack([x**2] * self.outputs, axis=1)
        return Samples(x[:, None], y, num_classes=None)


def test_mse_has_one_hot_targets_and_cross_entropy_class_numbers() -> None:
    squares, entropy = build_problem(spec(), 0), build_problem(spec(loss="cross-entropy"), 0)
    inputs, one_hot = squares.train
    assert inputs.shape == (100, 1, 8, 8)
    assert one_hot.shape == (100, 10)
    assert one_hot.dtype == torch.float32
    assert set(one_hot.unique().tolist()) == {0.0, 1.0}
    classes = entropy.train[1]
    assert classes.dtype == torch.int64
    assert torch.equal(one_hot.argmax(dim=1), classes)
    assert torch.equal(squares.labels(one_hot), entropy.labels(classes))


def test_accuracy_is_the_share_of_largest_outputs_at_the_right_class() -> None:
    for loss in ("mse", "cross-entropy"):
        problem = build_problem(spec(loss=loss), 0)
        assert problem.test is not None
        targets = problem.test[1]
        labels = problem.labels(targets)
        output = torch.eye(10)[labels]
        assert problem.accuracy(output, targets).item() == 1.0
        output[:5] = -output[:5]
        assert problem.accuracy(output, targets).item() == pytest.approx(15 / 20)


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others() -> None:
    first = parameters(build_problem(spec(), 3))
    torch.rand(7)
    assert torch.equal(first, parameters(build_problem(spec(), 3)))
    assert not torch.equal(first, parameters(build_problem(spec(), 4)))


def test_initial_parameters_do_not_depend_on_dtype_or_defaults() -> None:
    single = build_problem(spec(), 3)
    torch.set_default_dtype(torch.float64)
    try:
        double = build_problem(spec(), 3, dtype=torch.float64)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.train[0].dtype == double.train[1].dtype == torch.float64
    assert torch.equal(parameters(single).double(), parameters(double))


def test_global_random_states_are_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    build_problem(spec(), 1)
    found = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(expected[0], found[0])
    np.testing.assert_array_equal(expected[1], found[1])
    assert expected[2] == found[2]


def test_the_random_state_is_restored_when_a_model_cannot_be_built() -> None:
    state = torch.get_rng_state()
    with pytest.raises(InvalidInput):
        build_problem(spec(model="transformer"), 0)
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_are_scaled_by_the_training_samples() -> None:
    problem = build_problem(spec(preprocess="standardize"), 0, dtype=torch.float64)
    spread = problem.train[0].std(dim=0, correction=0)
    assert bool(((spread - 1).abs() < 1e-12).logical_or(spread == 0).all())


def test_the_fingerprint_tells_data_apart() -> None:
    first = build_problem(spec(), 0).fingerprint()
    assert first == build_problem(spec(), 1).fingerprint()
    assert first != build_problem(spec(samples=99), 0).fingerprint()


def test_regression_has_as_many_outputs_as_targets() -> None:
    for outputs in (1, 2):
        problem = build_problem(
            spec(
                data={"name": "test-curve", "outputs": outputs},
                samples=None,
                test_samples=None,
                preprocess="none",
            ),
            0,
        )
        assert problem.train[1].shape == (20, outputs)
        assert problem.test is None
        assert problem.loss(problem.model(problem.train[0]), problem.train[1]).ndim == 0
        with pytest.raises(InvalidInput, match="no accuracy without classes"):
            problem.accuracy(problem.train[1], problem.train[1])


def test_cross_entropy_needs_classes() -> None:
    with pytest.raises(InvalidInput, match="the data set has no classes"):
        build_problem(
            spec(data="test-curve", samples=None, test_samples=None, loss="cross-entropy"), 0
        )


def test_too_many_samples_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(InvalidInput, match=r"samples of digits: got 1797, .* from 1 to 1437"):
        build_problem(spec(samples=1797), 0)


def test_notes_on_the_data_are_passed_on(tmp_path: Path) -> None:
    write_mnist(tmp_path, "t10k", 40)
    data = {"name": "mnist", "data_dir": str(tmp_path)}
    problem = build_problem(spec(data=data, samples=10, balanced=True), 0)
    assert "only the test images of MNIST" in problem.notes[0]
    assert sorted(problem.labels(problem.train[1]).tolist()) == list(range(10))


def test_reading_the_settings_does_not_import_pytorch() -> None:
    code = "import sys, thalweg.problems; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_shared_data
def test_phrases_go_through_the_transformer() -> None:
    problem = build_problem(
        spec(
            data={"name": "sst2", "data_dir": str(SHARED)},
            samples=40,
            balanced=True,
            preprocess="none",
            model={"name": "transformer", "width": 16, "feed_forward": 32},
        ),
        0,
    )
    inputs, targets = problem.train
    assert inputs.dtype == torch.int64
    assert problem.labels(targets).sum().item() == 20
    assert problem.loss(problem.model(inputs), targets).isfinite()
