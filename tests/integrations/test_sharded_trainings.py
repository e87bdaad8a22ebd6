"""FSDP2 in real trainings: watched, left alone, resumed, and right.

The reference is one process's dense Hessian in float64, over the watched samples of all processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.dense import gradient, hessian
from tests.integrations.sharded_processes import (
    PATIENCE,
    SAMPLES,
    SETTINGS,
    blocks,
    labelled,
    token_loss,
)

ROOT = Path(__file__).parents[2]
Numbers = dict[str, Any]
Loss = Callable[[Tensor], Tensor]


def trained(kind: str, folder: Path) -> list[Numbers]:
    """What both processes have seen of a kind's trainings."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.integrations.sharded_processes"]
    done = subprocess.run(
        [*command, kind, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=PATIENCE + 60,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def drawn(count: int) -> Tensor:
    """The samples of a data set that callbacks watch by themselves."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLES]


def losses(kind: str, setting: str) -> Loss:
    """The watched loss as a function of theta (P,), in one process and float64."""
    if kind == "huggingface":
        from tests.integrations import test_huggingface as own

        network, tokens = own.model(dropout=0.0).double().eval(), own.Tokens().tokens[drawn(80)]
        called, compute = {"input_ids": tokens}, lambda output: token_loss(output, tokens)
    else:
        accelerate = kind == "accelerate"
        count = 240 if accelerate else {"double": 20, "lowered": 40}[setting]
        inputs, labels = labelled(count)
        rows = torch.arange(SAMPLES) if accelerate else drawn(count)
        network, called = blocks().double(), {"input": inputs[rows].double()}
        compute = lambda output: nn.functional.cross_entropy(output, labels[rows])  # noqa: E731
    named = dict(network.named_parameters())

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([parameter.numel() for parameter in named.values()])
        state = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(named.items(), parts, strict=True)
        }
        with sdpa_kernel(SDPBackend.MATH):
            return compute(functional_call(network, state, (), called))

    return loss


def shown(row: Numbers) -> str:
    """All of a row but its time, to the last bit; a NaN is equal to itself so."""
    return repr({name: value for name, value in row.items() if name != "seconds"})


def check_training_is_left_alone(runs: Numbers) -> None:
    for name in ("watched", "failing", "resumed"):
        assert torch.equal(runs[name]["theta"], runs["alone"]["theta"]), name


def check_resumed_run_goes_on_as_the_whole_one(runs: Numbers) -> None:
    whole, resumed = (runs[name]["rows"] for name in ("watched", "resumed"))
    assert [row["step"] for row in whole] == [0, 2, 4]
    assert [shown(row) for row in resumed] == [shown(row) for row in whole if row["step"] >= 3]
    assert runs["watched"]["warnings"] == runs["resumed"]["warnings"] == []


def check_all_skip_a_report_that_fails_in_one(processes: list[Numbers]) -> None:
    failure = "rank 1 of 2: ValueError: this probe"
    for runs in processes:
        assert [row["failure"] for row in runs["failing"]["rows"]] == [None, failure, None]
    first, second = (runs["failing"]["warnings"] for runs in processes)
    assert second == []
    assert len(first) == 1
    assert failure in first[0]


def check_values_are_those_of_one_process(runs: Numbers, loss: Loss, double: bool) -> None:
    rounding = 1e-12 if double else 2e-5
    row, point = runs["watched"]["rows"][-1], runs["watched"]["points"][-1]
    theta = point["theta"].double()
    dense, slope = hessian(loss, theta), gradient(loss, theta)
    values, vectors = torch.linalg.eigh(dense)
    top, basis = values.flip(0)[:2], vectors.flip(1)[:, :2]
    assert row["loss"] == pytest.approx(float(loss(theta)), rel=rounding)
    if double:
        assert point["eigenvalues"].tolist() == pytest.approx(top.tolist(), rel=1e-10)
    # Of a solve's eigenvalues the error is second order in that of its subspace.
    assert row["subspace_error"] < 1e-3
    assert row["eigenvalues"] == pytest.approx(top.tolist(), rel=max(1e-6, rounding))
    assert row["sharpness"] == row["eigenvalues"][0]
    chi = float((basis.T @ slope).norm() / slope.norm())
    assert row["alignment_gradient"] == pytest.approx(chi, rel=2e-3)
    # The report is of the fifth step; betas and epsilon are AdamW's own.
    root = (point["second_moments"].double() / (1 - 0.999**5)).sqrt() + 1e-8
    scale = (root * (1 - 0.9**5)).rsqrt()
    preconditioned = torch.linalg.eigvalsh(scale[:, None] * dense * scale)[-1]
    assert row["preconditioned_sharpness"] == pytest.approx(float(preconditioned), rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 120)
@pytest.mark.parametrize("kind", ["huggingface", "accelerate", "lightning"])
def test_fsdp2_in_a_real_training_is_watched_as_one_process_would_be(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip({"huggingface": "transformers"}.get(kind, kind))
    processes = trained(kind, tmp_path)
    for setting in SETTINGS:
        both = [found[setting] for found in processes]
        for runs in both:
            check_training_is_left_alone(runs)
            check_resumed_run_goes_on_as_the_whole_one(runs)
        check_all_skip_a_report_that_fails_in_one(both)
        check_values_are_those_of_one_process(both[0], losses(kind, setting), setting == "double")
        first, second = ([shown(row) for row in runs["watched"]["rows"]] for runs in both)
        assert first == second
    if kind == "lightning":
        assert all("tensor parallel" in found["refused"] for found in processes)
