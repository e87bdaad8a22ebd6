from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from thalweg.errors import InvalidInput
from thalweg.integrations.lightning import CurvatureCallback
from thalweg.loss.objective import Objective
from thalweg.measure.sinks import WatchWarning
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import eigenpairs

pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(LightningModule):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self(inputs), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        halves = self.net[0], self.net[3]
        return [torch.optim.SGD(half.parameters(), lr=0.05) for half in halves]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=generator)
    targets = torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)


def trained(
    module: type[Classifier] = Classifier,
    callback: CurvatureCallback | None = None,
    steps: int = 6,
    resume: str | None = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Classifier:
    seed_everything(0, verbose=False)
    network = module()
    loader = data()
    given = [*(callbacks or []), *([] if callback is None else [callback])]
    settings: dict[str, Any] = {
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": bool(callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": given,
    }
    trainer = Trainer(**{**settings, **options})
    trainer.fit(network, loader, loader, ckpt_path=resume)
    trainer.validate(network, loader, verbose=False)
    return network


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def rows_of(callback: CurvatureCallback) -> list[dict[str, Any]]:
    assert callback.watcher is not None
    return callback.watcher.history


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param({"inference_mode": True, "num_sanity_val_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["accumulated-and-clipped", "bfloat16", "inference-mode"],
)
def test_one_entry_reports_and_leaves_the_training_bit_for_bit(options: dict[str, Any]) -> None:
    callback = CurvatureCallback(samples=16, every=2, k=2)
    assert torch.equal(flat(trained(**options)), flat(trained(callback=callback, **options)))
    rows = rows_of(callback)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["failure"] for row in rows] == [None] * 3
    assert all(row["alignment_minibatch"] is not None for row in rows)


class ByParts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("module", [Classifier, ByParts])
def test_batches_are_counted_whatever_the_step_calls(module: type[Classifier]) -> None:
    callback = CurvatureCallback(samples=16, every=2, k=2)
    trained(module, callback, steps=3)
    row = rows_of(callback)[0]
    assert row["overhead"] == pytest.approx(row["report_gradients"] * 16 / 8)


def test_the_sharpness_is_that_of_the_training_step() -> None:
    callback = CurvatureCallback(samples=64, every=1, k=1, exact=True)
    trained(callback=callback, steps=1)
    seed_everything(0, verbose=False)
    network = Classifier().eval()
    objective = Objective(network, nn.CrossEntropyLoss(), data().dataset.tensors)  # type: ignore[attr-defined]
    truth = eigenpairs(Hessian(objective), 1, tolerance=1e-5)
    assert rows_of(callback)[0]["sharpness"] == pytest.approx(float(truth.eigenvalues[0]), rel=1e-3)


class Decorated(Classifier):
    @torch.autocast("cpu", enabled=False)
    def training_step(self, batch: Any, number: int) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, number)


class Alone(Classifier):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class Doubled(Classifier):
    """Its batches reach `training_step` by way of its hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"doubled": 2 * batch[0], "targets": batch[1]}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["doubled"], batch["targets"]


@pytest.mark.parametrize(
    ("module", "options"),
    [(Decorated, {}), (Alone, {}), (Doubled, {}), (Classifier, {"precision": "64-true"})],
    ids=["decorated", "one-argument", "hooks-of-batches", "float64"],
)
def test_training_step_gets_what_lightning_gives_it(
    module: type[Classifier], options: dict[str, Any]
) -> None:
    callback = CurvatureCallback(samples=16, every=2)
    watched = trained(module, callback, steps=1, **options)
    assert torch.equal(flat(watched), flat(trained(module, steps=1, **options)))
    seed_everything(0, verbose=False)
    network = module().to(next(watched.parameters()).dtype)
    inputs, targets = data().dataset.tensors  # type: ignore[attr-defined]
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:16].sort().values
    inputs = (2 if module is Doubled else 1) * inputs[rows].to(next(watched.parameters()).dtype)
    network.eval()
    loss = nn.functional.cross_entropy(network(inputs), targets[rows])
    assert rows_of(callback)[0]["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_a_resumed_run_reports_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    def kept() -> list[Any]:
        return [ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)]

    first = CurvatureCallback(samples=16, every=2, k=2)
    # An epoch is eight steps: the third is in its middle, so the order of batches is the same.
    whole = trained(callback=first, callbacks=kept(), steps=6)
    (saved,) = tmp_path.glob("*step=3.ckpt")
    second = CurvatureCallback(samples=16, every=2, k=2)
    again = trained(callback=second, callbacks=kept(), steps=6, resume=str(saved))
    assert rows_of(second)[0]["step"] == 4
    assert flat(again).shape == flat(whole).shape
    assert rows_of(second)[0]["effective_lr_bulk"] is not None


def test_manual_optimization_needs_a_loss_and_watches_one_of_several_optimizers() -> None:
    with pytest.raises(InvalidInput, match="manual optimization"):
        trained(Manual, CurvatureCallback(samples=16, every=2, k=1), steps=4)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    callback = CurvatureCallback(samples=16, every=1, k=1, loss=loss, optimizer=1)
    watched = trained(Manual, callback, steps=4)
    assert torch.equal(flat(trained(Manual, steps=4)), flat(watched))
    rows = rows_of(callback)
    assert [row["step"] for row in rows] == [0, 1]
    assert callback.watcher is not None
    assert callback.watcher.objective.num_parameters == 8 * 3 + 3


@pytest.mark.parametrize(
    ("name", "said"), [("FSDPStrategy", "FSDP 1"), ("DeepSpeedStrategy", "DeepSpeed ZeRO")]
)
def test_layouts_that_cannot_be_right_are_refused_by_name(name: str, said: str) -> None:
    trainer: Any = type("Trainer", (), {"strategy": type(name, (), {})()})()
    with pytest.raises(InvalidInput, match=said):
        CurvatureCallback().on_train_start(trainer, Classifier())


class Sharded(Classifier):
    """By FSDP2, as `ModelParallelStrategy` asks for it."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.fixture
def sharding() -> Iterator[Callable[..., dict[str, Any]]]:
    """Gives a trainer FSDP2 over this process alone; group and environment are as before then."""

    def options(**settings: Any) -> dict[str, Any]:
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, **settings)
        return {"strategy": strategy, "devices": 1}

    with patch.dict(os.environ):
        yield options
        dist.destroy_process_group()


def kept(folder: Path) -> list[Any]:
    return [ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")]


def test_a_model_in_shards_is_watched_and_goes_on_from_its_checkpoint(
    sharding: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first, second, plain = (CurvatureCallback(samples=16, every=2, k=2) for _ in range(3))
    alone = trained(Sharded, **sharding())
    watched = trained(Sharded, first, callbacks=kept(tmp_path), **sharding())
    assert torch.equal(flat(alone), flat(watched))
    assert [row["failure"] for row in rows_of(first)] == [None] * 3
    # Batches come in another order with processes: the same point is the first alone.
    trained(callback=plain, steps=1)
    begin, expected = rows_of(first)[0], rows_of(plain)[0]
    for name in ("loss", "sharpness", "alignment_gradient"):
        assert begin[name] == pytest.approx(expected[name], rel=1e-4), name
    # No warning: the state is read. (In the middle of an epoch Lightning repeats batches.)
    file = str(tmp_path / "step=3.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        trained(Sharded, second, callbacks=kept(tmp_path), resume=file, **sharding())
    assert [row["step"] for row in rows_of(second)] == [4]
    assert second.watcher is not None
    assert [row["step"] for row in second.watcher.state_dict()["tiers"]["full"]["recent"]] == [
        0,
        2,
        4,
    ]


def test_a_checkpoint_in_one_file_says_that_it_has_not_the_state_of_shards(
    sharding: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def run(resume: str | None = None) -> CurvatureCallback:
        callback = CurvatureCallback(samples=16, every=2, k=2)
        options = sharding(save_distributed_checkpoint=False)
        trained(Sharded, callback, callbacks=kept(tmp_path), resume=resume, **options)
        return callback

    with pytest.warns(WatchWarning, match="save_distributed_checkpoint=True"):
        run()
    with pytest.warns(WatchWarning, match="its subspace is new"):
        again = run(str(tmp_path / "step=3.ckpt"))
    assert [row["step"] for row in rows_of(again)] == [4]
