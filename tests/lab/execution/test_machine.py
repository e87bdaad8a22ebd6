from __future__ import annotations

import os
from typing import Any

import pytest

from thalweg.lab.execution.machine import compute_repeatably
from thalweg.lab.execution.processes import call


def settings_after(device: str) -> dict[str, Any]:
    """What decides on the last bits of a GPU's numbers, in a process that computes there."""
    import torch
    from torch.utils import deterministic

    compute_repeatably(device)
    backends: Any = torch.backends
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "precisions": [backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision],
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_on_a_gpu_the_same_seed_is_made_to_give_the_same_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert call(settings_after, (name,)) == {
        "deterministic": True,
        "only warns": True,
        "fills": False,
        "precisions": ["ieee", "ieee"],
        "workspace": ":4096:8",
    }


def test_on_a_cpu_nothing_is_changed() -> None:
    assert call(settings_after, ("cpu",))["deterministic"] is False
