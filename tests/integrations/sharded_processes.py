"""Trainings by real trainers with FSDP2 on two CPU processes: started by the tests, once for each.

torchrun --nproc-per-node 2 -m tests.integrations.sharded_processes KIND FOLDER

Each kind trains as its `SETTINGS` say: alone, watched, with a probe that fails on one process, and
resumed from a checkpoint in the middle. What each process has seen goes to FOLDER/RANK.pt.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from thalweg.errors import InvalidInput
from thalweg.measure.probes import Probe
from thalweg.measure.sinks import WatchWarning
from thalweg.measure.step_state import StepState
from thalweg.measure.watch import watch
from thalweg.operators.hessian import Hessian
from thalweg.sharding import whole
from thalweg.spectrum.eigensolver import eigenpairs

Numbers = dict[str, Any]
SAMPLES = 9
"""Five on the first process, four on the second."""
WATCHED: Numbers = {"every": 2, "k": 2, "exact": True}
SETTINGS = ("double", "lowered")
"""In float64; and in bfloat16 with float32 parameters, accumulation, clipping and dropout."""
PATIENCE = 700
"""Seconds, on a machine that has other work."""
points: list[Numbers] = []


def point(state: StepState) -> Numbers:
    """Keep of a report what a reference needs: theta, and Adam's second moments after its step.

    And in float64 eigenvalues that are solved until rounding stops them.
    """
    assert state.optimizer is not None
    moments: Any = [state.optimizer.state[p]["exp_avg_sq"] for p in state.objective.parameters()]
    kept = {
        "theta": whole(state.theta),
        "second_moments": torch.cat([part.full_tensor().reshape(-1) for part in moments]),
    }
    if state.theta.dtype is torch.float64:
        operator = Hessian(state.objective, state.theta)
        kept["eigenvalues"] = eigenpairs(operator, 2, tolerance=1e-9).eigenvalues
    points.append(kept)
    return {"point": None}


def fails_on_one(state: StepState) -> Numbers:
    """Fail on the second process, in the second report."""
    if dist.get_rank() == 1 and state.step == 2:
        raise ValueError("this probe")
    return {"fails_on_one": None}


# Of these processes alone: the tests of all probes that are registered import this module too.
POINT = Probe("point", ("point",), point)
FAILS_ON_ONE = Probe("fails_on_one", ("fails_on_one",), fails_on_one)


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let Accelerate shard on CPUs what it would shard on GPUs.

    Without a word it leaves an FSDP plugin aside where processes have no accelerators, and takes
    DDP: which kind of processes these are is all that is said otherwise here. Plugin, policies,
    `prepare`, clipping and checkpoints are Accelerate's and the Trainer's own.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    as_it_is: Any = AcceleratorState.__init__

    def begin(state: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        as_it_is(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and state.distributed_type is DistributedType.MULTI_CPU:
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin
    try:
        yield
    finally:
        AcceleratorState.__init__ = as_it_is


def seen(run: Callable[[], tuple[nn.Module, Any]]) -> Numbers:
    """The end of a training, what was reported in it, and what Thalweg warned of."""
    points.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, watcher = run()
    assert any(isinstance(module, FSDPModule) for module in model.modules())
    parameters: Any = [*model.parameters()]
    return {
        "theta": torch.cat([p.full_tensor().detach().reshape(-1) for p in parameters]),
        "points": [*points],
        "rows": [] if watcher is None else watcher.history,
        "warnings": [str(each.message) for each in caught if each.category is WatchWarning],
    }


def four(run: Callable[..., tuple[nn.Module, Any]], folder: Path, checkpoint: str) -> Numbers:
    """A training alone, watched, failing, and resumed from the checkpoint of the watched one."""
    watched = folder / "watched"
    return {
        "alone": seen(lambda: run(folder / "alone", None)),
        "watched": seen(lambda: run(watched, [POINT])),
        "failing": seen(lambda: run(folder / "failing", [FAILS_ON_ONE])),
        "resumed": seen(lambda: run(watched, [POINT], resume=watched / checkpoint)),
    }


def refused(run: Callable[[], object]) -> str:
    """What is said of a layout that is not known."""
    try:
        run()
    except InvalidInput as error:
        return str(error)
    return "nothing"


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Of next tokens, in the precision of the outputs; transformers' own is in float32."""
    predicted, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(predicted, targets, reduction="sum")
    return total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


# What `accelerate launch` makes of a configuration file with `fsdp_version: 2`.
CONFIGURED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
}


def huggingface(folder: Path) -> Numbers:
    """The Trainer with FSDP 2: by its own arguments, and by a configuration of accelerate."""
    from tests.integrations import test_huggingface as own

    def run(
        folder: Path,
        probes: list[Probe] | None,
        *,
        resume: Path | None = None,
        loss: Any = None,
        **settings: Any,
    ) -> tuple[nn.Module, Any]:
        _, callback, trainer = own.trained(
            folder,
            None if probes is None else {"samples": SAMPLES, **WATCHED, "probes": probes},
            network=own.model().double() if loss else own.model(),
            resume=None if resume is None else str(resume),
            loss=loss,
            **settings,
        )
        return trainer.model, callback and callback.watcher

    double: Numbers = {"loss": token_loss, "fsdp": True, "fsdp_config": {"version": 2}}
    lowered = {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    with fsdp_on_cpu():
        found = {"double": four(partial(run, **double), folder / "double", "checkpoint-3")}
        with patch.dict(os.environ, CONFIGURED):
            found["lowered"] = four(partial(run, **lowered), folder / "lowered", "checkpoint-3")
    return found


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.drop = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.drop(self.down(torch.tanh(self.up(self.norm(inputs)))))


def blocks(dropout: float = 0.0) -> nn.Sequential:
    """Of four inputs and three classes, P = 321."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Block(dropout), Block(dropout), nn.Linear(6, 3))


def labelled(count: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def accelerate(folder: Path) -> Numbers:
    """A loop of one's own around Accelerate with FSDP 2."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    loss = nn.CrossEntropyLoss()

    def prepared(**settings: Any) -> tuple[Any, nn.Module, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **settings)
        model = blocks(dropout=0.1) if settings else blocks().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return accelerator, *accelerator.prepare(model, optimizer)

    def run(
        folder: Path, probes: list[Probe] | None, *, resume: Path | None = None, **settings: Any
    ) -> tuple[nn.Module, Any]:
        accelerator, model, optimizer = prepared(**settings)
        inputs, labels = labelled(240)
        inputs = inputs if settings else inputs.double()
        rank, parts, watcher, first = dist.get_rank(), 2 if settings else 1, None, 0
        if resume is not None:
            accelerator.load_state(str(resume))
            first = 3
        if probes is not None:
            own = inputs[:SAMPLES][rank::2], labels[:SAMPLES][rank::2]
            watcher = watch(
                model, loss, own, optimizer, group=dist.group.WORLD, probes=probes, quiet=True,
                resume_at=first or None, **WATCHED,
            )  # fmt: skip
            if resume is not None:
                watcher.load_state_dict(torch.load(resume / f"thalweg-{rank}.pt"))
        for batch in range(parts * first, parts * 6):
            rows = slice(20 * batch + 10 * rank, 20 * batch + 10 * rank + 10)
            with accelerator.accumulate(model):
                torch.manual_seed(100 * batch + rank)
                accelerator.backward(loss(model(inputs[rows]), labels[rows]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if batch == parts * 3 - 1 and watcher is not None:
                accelerator.save_state(str(folder / "state"))
                torch.save(watcher.state_dict(), folder / "state" / f"thalweg-{rank}.pt")
        return model, watcher

    lowered: Numbers = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    with fsdp_on_cpu():
        return {
            "double": four(run, folder / "double", "state"),
            "lowered": four(partial(run, **lowered), folder / "lowered", "state"),
        }


def lightning(folder: Path) -> Numbers:
    """`ModelParallelStrategy` as it is, on CPUs."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader, TensorDataset

    from thalweg.integrations.lightning import CurvatureCallback

    class Classifier(LightningModule):
        net: Any

        def __init__(self, dtype: torch.dtype, tensor_parallel: bool) -> None:
            super().__init__()
            self.lowered, self.tensor_parallel = dtype is torch.float32, tensor_parallel
            self.parameters_in = dtype

        def configure_model(self) -> None:
            self.net = blocks().to(self.parameters_in)
            assert self.device_mesh is not None
            if self.tensor_parallel:
                mesh = self.device_mesh["tensor_parallel"]
                parallelize_module(self.net, mesh, {"0": ColwiseParallel()})
                return
            mesh = self.device_mesh["data_parallel"]
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.lowered else None)
            for block in (self.net[1], self.net[2]):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(self.net, mesh=mesh, mp_policy=policy)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    def run(
        folder: Path,
        probes: list[Probe] | None,
        *,
        resume: Path | None = None,
        tensor_parallel: int = 1,
        **settings: Any,
    ) -> tuple[nn.Module, Any]:
        seed_everything(0, verbose=False)
        kept = ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks: list[Any] = [kept]
        if probes is not None:
            callbacks.append(CurvatureCallback(samples=SAMPLES, **WATCHED, probes=probes))
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(
                data_parallel_size=2 // tensor_parallel, tensor_parallel_size=tensor_parallel
            ),
            max_steps=6,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=callbacks,
            **settings,
        )
        dtype = torch.float32 if settings else torch.float64
        module = Classifier(dtype, tensor_parallel > 1)
        # An epoch is one step: of one that is resumed in its middle Lightning repeats batches.
        inputs, labels = labelled(40 if settings else 20)
        loader = DataLoader(TensorDataset(inputs.to(dtype), labels), batch_size=10)
        trainer.fit(module, loader, ckpt_path=resume)
        return module, callbacks[-1].watcher if probes is not None else None

    lowered: Numbers = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    return {
        "double": four(run, folder / "double", "step=3.ckpt"),
        "lowered": four(partial(run, **lowered), folder / "lowered", "step=3.ckpt"),
        "refused": refused(lambda: run(folder / "tensor", [], tensor_parallel=2)),
    }


KINDS = {"huggingface": huggingface, "accelerate": accelerate, "lightning": lightning}


def main() -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    found = KINDS[kind](folder)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
