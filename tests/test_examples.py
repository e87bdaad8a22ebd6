"""The examples that users copy run as they stand, and print what their docstrings promise."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.test_readme import blocks

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


# Each trains twice, with and without. What it needs, tiny settings, and those of a slow run; data
# is what they fall back on.
TRAININGS = {
    "accelerate_loop.py": (
        ["accelerate"],
        "--epochs 1 --every 11 --width 8",
        "--epochs 40 --every 150",
    ),
    "hugging_face_gpt2.py": (
        ["transformers", "accelerate"],
        "--steps 3 --every 2 --layers 1 --width 16",
        "--steps 41 --every 20 --layers 2 --width 64",
    ),
    "resnet_cifar10.py": (
        [],
        "--images 64 --steps 3 --every 2 --width 2",
        "--images 256 --steps 41 --every 20",
    ),
    "lstm.py": ([], "--steps 3 --every 2 --width 4", "--steps 401 --every 100"),
    "vit.py": (
        ["transformers"],
        "--images 64 --steps 3 --every 2 --layers 1 --width 8",
        "--images 256 --steps 41 --every 20 --layers 2 --width 32",
    ),
    "lora.py": (
        ["transformers", "accelerate", "peft"],
        "--steps 3 --every 2 --layers 1 --width 16",
        "--steps 41 --every 20 --layers 2 --width 64",
    ),
}
TINY = [(name, needs, tiny.split()) for name, (needs, tiny, _) in TRAININGS.items()]
SLOW = [(name, needs, longer.split()) for name, (needs, _, longer) in TRAININGS.items()]


def lines_of_processes(name: str, count: int, folder: Path | None = None) -> list[str]:
    """What an example prints that torchrun starts in some processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={count}", EXAMPLES / name],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def lines_of(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(EXAMPLES)
        # A script may choose a default dtype, in a process of its own.
        default = torch.get_default_dtype()
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_default_dtype(default)
        return capsys.readouterr().out.splitlines()

    return lines_of


def numbers(line: str) -> list[float]:
    return [float(found) for found in NUMBER.findall(line)]


def test_own_model_finds_the_gap_and_follows_the_subspace(run) -> None:
    eigenvalues, solve, _, *rows, cost = run("own_model.py")
    found = numbers(eigenvalues)
    assert found == sorted(found, reverse=True)
    assert "converged: True, widest gap below k = 4" in solve  # one for each output
    table = [numbers(row) for row in rows]
    assert [row[0] for row in table] == [0, 20, 40, 60, 80]
    assert table[-1][1] < table[0][1]
    assert all(sharpness >= last > following for _, _, sharpness, last, following, *_ in table)
    assert all(0 <= alignment <= 1 and error < 2 for *_, alignment, error in table)
    assert numbers(cost)[0] < numbers(solve)[0]


@pytest.mark.slow
def test_split_update_learns_in_the_bulk_and_stalls_in_the_dominant_subspace(run) -> None:
    losses = [numbers(line.split("loss")[1])[0] for line in run("split_update.py")]
    start, sgd, dominant, bulk = losses
    assert bulk < start - 0.5 * (start - sgd)
    assert dominant > start - 0.5 * (start - sgd)


def test_hugging_face_style_model_weighs_batches_by_their_tokens(run) -> None:
    mean, gauss_newton, hessian, head = run("hugging_face_style_model.py")
    loss, _, by_hand = numbers(mean)
    assert loss == pytest.approx(by_hand, abs=2e-6)
    assert all(value > 0 for value in numbers(gauss_newton))
    # A block of a symmetric matrix has no larger eigenvalue than the whole.
    assert numbers(head)[-1] <= numbers(hessian)[0]
    assert numbers(head)[0] == 108


def test_scipy_operator_agrees_with_the_solvers_of_scipy(run) -> None:
    pytest.importorskip("scipy")
    *spectrum, step = run("scipy_operator.py")
    for by_scipy, by_thalweg in zip(spectrum[::2], spectrum[1::2], strict=True):
        assert len(numbers(by_scipy)) == 3
        assert sorted(numbers(by_scipy)) == pytest.approx(sorted(numbers(by_thalweg)), abs=2e-6)
    before, after = numbers(step.split("loss")[1].replace("->", ""))
    assert "solved: True" in step
    assert after < before


def test_watch_training_reports_the_threshold_of_adam(run) -> None:
    reports, threshold, _ = run("watch_training.py")
    count, before, after = numbers(reports.replace("->", ""))
    assert count == 5
    assert after < before
    # (2 + 2 beta1) / ((1 - beta1) lr), Cohen et al. 2022
    assert numbers(threshold)[-1] == round(3.8 / (0.1 * 0.003))


def test_spectrum_has_one_trace_by_two_ways_and_a_figure(run, tmp_path: Path) -> None:
    extremes, hutch, density, area, _ = run("spectrum.py", str(tmp_path))
    smallest, largest = numbers(extremes)
    assert smallest < 0 < largest
    first, first_error = numbers(hutch.split("++ ")[1].replace("+-", ""))
    second, second_error = numbers(density.replace("+-", ""))
    assert abs(first - second) < 4 * (first_error**2 + second_error**2) ** 0.5
    assert numbers(area)[0] == pytest.approx(1, abs=0.01)
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_subspace_langevin_saves_gradients_where_its_blocks_precondition(
    run, tmp_path: Path
) -> None:
    lines = run("subspace_langevin.py", str(tmp_path), "--size", "4")
    verdicts = [line for line in lines if "≤" in line]
    assert ["holds" in line and "not" not in line for line in verdicts] == [True, True, False, True]
    table = pd.read_csv(tmp_path / "subspace-langevin.csv")
    last = table.groupby(["seed", "branch"])["covariance_error"].last()
    assert len(last) == 15
    assert last.tolist() == pytest.approx([0.05] * 15, rel=0.02)
    followed, plain = (
        line.split("variance ")[1] for line in lines if "  plain: " in line or "its width: " in line
    )
    # Of 500 independent chains: four standard errors.
    assert float(followed) == pytest.approx(9, abs=4 * 9 * (2 / 500) ** 0.5)
    assert not float(plain) < 90
    assert (tmp_path / "subspace-langevin.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_jacobian_counts_every_singular_value(run, tmp_path: Path) -> None:
    small = ("--hidden", "1", "--epochs", "1", "--seeds", "0", "1")
    lines = run("training_jacobian.py", str(tmp_path), *small)
    assert sum("P=85, N=1600" in line for line in lines) == 6
    table = pd.read_csv(tmp_path / "training-jacobian.csv")
    shares = table[["chaotic_share", "bulk_share_1e-02", "stable_share"]].sum(axis=1)
    assert shares.tolist() == pytest.approx([1.0] * 6)
    assert (table["bulk_share_1e-06"] <= table["bulk_share_1e-03"]).all()
    digits = table[table["branch"] == "digits"]
    # Three pixels are the same in all images; whatever weighs them comes through as it was.
    assert (digits["bulk_share_1e-06"] > 0).all()
    assert (digits["loss_in_bulk"] > digits["loss_end"]).all()
    assert (digits[["overlap_seeds", "overlap_shuffled"]] <= 1).all(axis=None)
    responses = pd.read_csv(tmp_path / "training-jacobian-responses.csv")
    smallest = responses[responses["size"] == responses["size"].min()]
    assert set(smallest["direction"]) == {"top", "bulk", "stable"}
    assert (smallest["error"] < 0.05).all()
    assert (tmp_path / "training-jacobian.png").read_bytes().startswith(b"\x89PNG")
    # A second run takes the Jacobians from their files.
    again = run("training_jacobian.py", str(tmp_path), *small, "--branches", "digits")
    assert sum("is taken over" in line for line in again) == 2
    once_more = pd.read_csv(tmp_path / "training-jacobian.csv")
    assert once_more["loss_in_bulk"].tolist() == digits["loss_in_bulk"].tolist()
    assert once_more["overlap_seeds"].tolist() == digits["overlap_seeds"].tolist()
    # Or leaves none.
    other = tmp_path / "other"
    run("training_jacobian.py", str(other), *small, "--branches", "white-noise", "--forget")
    assert [file.suffix for file in tmp_path.glob("jacobian-*")] == [".safetensors"] * 6
    assert not list(other.glob("jacobian-*"))


def test_training_jacobian_of_one_seed_counts_every_singular_value(run, tmp_path: Path) -> None:
    small = ("--hidden", "1", "--epochs", "1", "--seeds", "0", "--branches", "white-noise")
    (line,) = (line for line in run("training_jacobian.py", str(tmp_path), *small) if "P=" in line)
    assert "P=85, N=1600" in line
    table = pd.read_csv(tmp_path / "training-jacobian.csv")
    shares = table[["chaotic_share", "bulk_share_1e-02", "stable_share"]].sum(axis=1)
    assert shares.tolist() == pytest.approx([1.0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    ("name", "needs", "settings"),
    [*TINY, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=[*TRAININGS, *(f"{name}-longer" for name in TRAININGS)],
)
def test_a_watched_training_is_the_same_and_its_sharpness_is_right(
    run, name: str, needs: list[str], settings: list[str]
) -> None:
    for library in needs:
        pytest.importorskip(library)
    trained, added, reports, overhead, same, sharpness = run(name, *settings)[-6:]
    _, steps, before, after = numbers(trained.replace("->", ""))
    assert steps < 20 or after < before
    assert numbers(added)[0] == (2 if "huggingface" in (EXAMPLES / name).read_text() else 1)
    count, last = numbers(reports)
    assert count >= 2
    assert 0 < last < steps
    assert numbers(overhead)[0] > 0
    assert same.split() == ["bit", "for", "bit", "yes"]
    reported, solved, off = numbers(sharpness)
    assert reported == pytest.approx(solved, rel=0.02)
    assert off <= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sharded_model_prints_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    said = [lines_of_processes("sharded_model.py", count, tmp_path) for count in (1, 2)]
    assert [line.partition("rows")[2] for line in said[0]] == [
        line.partition("rows")[2] for line in said[1]
    ]
    for alone, shared in zip(*said, strict=True):
        assert numbers(alone)[-1] == pytest.approx(numbers(shared)[-1], rel=1e-3)
    _, rows, *_ = numbers(said[0][0])
    assert numbers(said[1][0])[1] == rows / 2
    losses = [numbers(line)[1] for line in said[1][2:]]
    assert losses == sorted(losses, reverse=True)


def test_local_sgd_learns_and_its_rounds_grow(run) -> None:
    start, end, rounds = run("local_sgd.py")
    assert numbers(end)[0] < 0.5 * numbers(start)[0]
    assert numbers(rounds.split(":")[1]) == [4, 16, 64, 256]  # (0.2 / lr)^2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tensor_parallel_prints_the_same_in_one_process_and_in_two(run) -> None:
    alone = run("tensor_parallel.py")
    together = lines_of_processes("tensor_parallel.py", 2)
    assert alone[1].split() == ["product", "exact"]
    assert "difference model: second derivatives through tensor parallel layers" in together[1]
    assert alone[2:] == together[2:]
    assert alone[-1].endswith("bit for bit the same: yes")


@pytest.mark.slow
def test_data_parallel_prints_the_same_in_one_process_and_in_two(run) -> None:
    alone = run("data_parallel.py")
    together = lines_of_processes("data_parallel.py", 2)
    assert (alone[0], together[0]) == ("1 processes, N = 1200", "2 processes, N = 1200")
    assert alone[1:] == together[1:]


def test_the_engine_of_the_readme_runs_after_its_first_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_model, engine, *_ = blocks("python")
    names: dict[str, object] = {}
    exec(compile(own_model.split("for step")[0], "README.md", "exec"), names)
    exec(compile(engine, "README.md", "exec"), names)
    top, trace, spectrum, _ = capsys.readouterr().out.splitlines()
    assert "converged=True" in top
    assert trace.startswith("TraceEstimate(value=")
    assert "probes=5, steps=40, num_matvecs=200" in spectrum
    assert names["limit"] == 2 / 0.1
