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
from torch.distributed.fsdp import FSDPModule

from thalweg.measure.probes import probe
from thalweg.measure.step_state import StepState
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
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    as_it_is: Any = AcceleratorState.__init__

    def begin(state: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        as_it_is(state, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and state.distributed_type is DistributedType.MULTI_CPU:
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

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

    sharded = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **settings.pop("fsdp", {})}

    def run(name: str, watched: Numbers | None, resume: str | None = None) -> Numbers:
        _, callback, trainer = own.trained(
            folder / name,
            watched,
            network=own.model(),
            resume=resume,
            fsdp=True,
            fsdp_config={**sharded},
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
        fsdp={"activation_checkpointing": True},
    )


KINDS: dict[str, Callable[[Path], Numbers]] = {
    "huggingface": huggingface,
    "huggingface-lowered": huggingface_lowered,
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
