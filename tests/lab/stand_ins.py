"""Small entries for the registries, so that tests of specs do not depend on the real ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from thalweg.registry import datasets, losses, models
from thalweg.settings import Settings

RAW: dict[str, Any] = {
    "problem": {
        "data": {"name": "points"},
        "samples": 1000,
        "model": {"name": "mlp", "hidden": [20, 10]},
        "loss": "mse",
    },
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.05}, "steps": 100}],
}
"""The tables of a small spec, as read from a file."""


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registries hold `points`, `mlp`, `cnn` and `mse`, nothing else."""
    import thalweg.problems  # noqa: F401  registers the real ones, which are set aside here

    for registry in (datasets, models, losses):
        monkeypatch.setattr(registry, "_entries", {})

    @datasets.register("points")
    class Points(Settings):
        data_dir: str | None = None

        def build(self) -> str:
            return "points"

    @models.register("mlp")
    class MLP(Settings):
        hidden: tuple[Annotated[int, Field(ge=1)], ...] = (200, 200)
        activation: Literal["tanh", "relu"] = "tanh"

        def build(self) -> tuple[int, ...]:
            return self.hidden

    @models.register("cnn")
    class CNN(Settings):
        width: int = 32

        def build(self) -> int:
            return self.width

    @losses.register("mse")
    class MSE(Settings):
        factor: float = 0.5

        def build(self) -> float:
            return self.factor
