"""Trainings by real trainers with FSDP2 on two CPU processes: started by the tests, once for each.

torchrun --nproc-per-node 2 -m tests.integrations.sharded_processes KIND FOLDER

Each kind trains alone, watched, and with a probe that fails on one process; where it saves
checkpoints it is resumed as well. What each process has seen goes to FOLDER/RANK.pt.
"""

from __future__ import annotations

import faulthandler
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from thalweg.measure.probes import probe
from thalweg.measure.step_state import StepState
from thalweg.measure.watch import watch
from thalweg.sharding import whole

Numbers = dict[str, Any]
WATCHED: Numbers = {"samples": 9, "every": 2, "k": 2, "exact": True, "error": 1e-4}
"""Nine samples: five on the first process, four on the second."""
points: list[Tensor] = []


@probe("point")
def point(state: StepState) -> Numbers:
    """Keep theta of a report, whole."""
    points.append(whole(state.theta))
    return {"point": None}


@probe("fails_on_one")
def fails_on_one(state: StepState) -> Numbers:
    """Fail on the second process, in the second report."""
    if dist.get_rank() == 1 and state.step == 2:
        raise ValueError("this probe")
    return {"fails_on_one": None}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let Accelerate shard on CPUs what it would shard on GPUs.

    It leaves an FSDP plugin aside where processes have no accelerators, and takes DDP: which kind
    of processes these are is all that is said otherwise here. Plugin, policies, `prepare`, clipping
    and checkpoints are Accelerate's and the Trainer's own.
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


def parameters_of(model: nn.Module) -> Tensor:
    """All P parameters of a model that FSDP2 has in its hands."""
    assert any(isinstance(module, FSDPModule) for module in model.modules())
    return torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()])  # type: ignore[attr-defined]


def seen(model: nn.Module, watcher: Any) -> Numbers:
    """The end of a training, and what was reported in it."""
    found = {"theta": parameters_of(model), "points": [*points]}
    points.clear()
    return found | {"rows": [] if watcher is None else watcher.history}


def huggingface(folder: Path, **settings: Any) -> Numbers:
    from tests.integrations import test_huggingface as own

    fsdp = {"version": 2, **settings.pop("fsdp", {})}

    def run(name: str, watched: Numbers | None, resume: str | None = None) -> Numbers:
        _, callback, trainer = own.trained(
            folder / name,
            watched,
            network=own.model(),
            resume=resume,
            fsdp=True,
            fsdp_config={**fsdp},
            **settings,
        )
        return seen(trainer.model, callback and callback.watcher)

    with fsdp_on_cpu():
        given = WATCHED | {"probes": ["point"]}
        return {
            "alone": run("alone", None),
            "watched": run("watched", given),
            "failing": run("failing", WATCHED | {"probes": ["fails_on_one"]}),
            "resumed": run("watched", given, str(folder / "watched" / "checkpoint-3")),
        }


def huggingface_lowered(folder: Path) -> Numbers:
    """In bfloat16, with activation checkpointing, accumulation and clipping."""
    return huggingface(
        folder,
        bf16=True,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        fsdp={"activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"},
    )


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
    """A loop of one's own, in bfloat16, with accumulation and clipping."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    loss, (inputs, labels) = nn.CrossEntropyLoss(), labelled(240)

    def run(name: str, probes: list[str] | None, resume: Path | None = None) -> Numbers:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        accelerator = Accelerator(
            mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True, fsdp_plugin=plugin
        )
        model = blocks(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        model, optimizer = accelerator.prepare(model, optimizer)
        rank, count = accelerator.process_index, accelerator.num_processes
        first = 3 if resume else 0
        if resume:
            accelerator.load_state(str(resume))
        watcher = None
        if probes is not None:
            own = inputs[:9][rank::count], labels[:9][rank::count]
            options = {name: value for name, value in WATCHED.items() if name != "samples"}
            watcher = watch(
                model, loss, own, optimizer, group=dist.group.WORLD, probes=probes, quiet=True,
                resume_at=first or None, **options,
            )  # fmt: skip
            if resume:
                watcher.load_state_dict(torch.load(resume / f"thalweg-{rank}.pt"))
        for step in range(2 * first, 12):
            part = slice(20 * step + 10 * rank, 20 * step + 10 * rank + 10)
            with accelerator.accumulate(model):
                torch.manual_seed(100 * step + rank)
                accelerator.backward(loss(model(inputs[part]), labels[part]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if step == 5 and watcher is not None and not resume:
                accelerator.save_state(str(folder / name))
                torch.save(watcher.state_dict(), folder / name / f"thalweg-{rank}.pt")
        return seen(model, watcher)

    with fsdp_on_cpu():
        return {
            "alone": run("alone", None),
            "watched": run("watched", ["point"]),
            "failing": run("failing", ["fails_on_one"]),
            "resumed": run("resumed", ["point"], folder / "watched"),
        }


def lightning(folder: Path, **settings: Any) -> Numbers:
    """`ModelParallelStrategy` as it is, on CPUs."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader, TensorDataset

    from thalweg.integrations.lightning import CurvatureCallback

    class Classifier(LightningModule):
        net: nn.Module

        def configure_model(self) -> None:
            self.net = blocks()
            assert self.device_mesh is not None
            mesh, lowered = self.device_mesh["data_parallel"], torch.bfloat16
            policy = MixedPrecisionPolicy(param_dtype=lowered if settings else None)
            for block in (self.net[1], self.net[2]):  # type: ignore[index]
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(self.net, mesh=mesh, mp_policy=policy)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    def run(name: str, probes: list[str] | None, resume: Path | None = None) -> Numbers:
        seed_everything(0, verbose=False)
        callback = None if probes is None else CurvatureCallback(**WATCHED, probes=probes)
        kept = ModelCheckpoint(
            folder / name, every_n_train_steps=3, save_top_k=-1, filename="{step}"
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            max_steps=6,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[kept, *([] if callback is None else [callback])],
            **settings,
        )
        module = Classifier()
        # An epoch is one step: of one that is resumed in its middle Lightning repeats batches.
        loader = DataLoader(
            TensorDataset(*labelled(20 * settings.get("accumulate_grad_batches", 1))), batch_size=10
        )
        trainer.fit(module, loader, ckpt_path=resume)
        return seen(module, callback and callback.watcher)

    return {
        "alone": run("alone", None),
        "watched": run("watched", ["point"]),
        "failing": run("failing", ["fails_on_one"]),
        "resumed": run("resumed", ["point"], folder / "watched" / "step=3.ckpt"),
    }


def lightning_lowered(folder: Path) -> Numbers:
    """With a policy of bfloat16, accumulation and clipping."""
    return lightning(folder, accumulate_grad_batches=2, gradient_clip_val=0.1)


KINDS: dict[str, Callable[[Path], Numbers]] = {
    "huggingface": huggingface,
    "huggingface-lowered": huggingface_lowered,
    "accelerate": accelerate,
    "lightning": lightning,
    "lightning-lowered": lightning_lowered,
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    found = KINDS[kind](folder)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
