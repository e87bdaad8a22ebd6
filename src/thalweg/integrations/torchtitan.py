"""Curvature in a run of torchtitan, by one line before `trainer.train()`:

    watcher = watch_trainer(trainer)

Rows are in the trainer's own TensorBoard or W&B charts, at its own steps. Written to the interface
of torchtitan's `Trainer` as of November 2026 (`model_parts`, `loss_fn`, `optimizers`, `dataloader`,
`metrics_processor.logger`, `step`), and tested with stand-ins of it alone: never yet in a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import invalid
from thalweg.integrations.dashboards import scalars
from thalweg.loss.reduce import several_processes
from thalweg.measure.watch import watch
from thalweg.measure.watcher import Watcher, undisturbed

BATCHES = 1
"""Of each process that are watched."""
EIGENVECTORS = 4
"""k: next-token prediction has no number of classes that stands out."""

Batch = tuple[Tensor, Tensor]
"""Tokens and labels, as the trainer's model and loss take them."""


class MetricsLogger:
    """A sink that hands rows to the logger of a trainer's metrics, as "thalweg/sharpness", ...

    Args:
        processor: the trainer's `metrics_processor`; its logger writes on one process alone.
    """

    def __init__(self, processor: Any) -> None:
        self._logger = processor.logger

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Write a row."""
        self._logger.log(scalars(row), step)

    def close(self) -> None:
        """Nothing: the trainer closes its logger."""


def watch_trainer(
    trainer: Any, data: Iterable[Batch] | None = None, *, k: int = EIGENVECTORS, **options: Any
) -> Watcher:
    """Watch the loss of a torchtitan trainer while it trains; close the watcher afterwards.

    Args:
        trainer: built, and loaded from a checkpoint where it goes on with one.
        data: batches to watch; default: the first `BATCHES` of each process's data loader, whose
            state is put back.
        k: dimension of the dominant subspace.
        options: further ones of `watch`, such as `budget`, `every`, `probes`, `sinks`.

    Raises:
        InvalidInput: pipeline parallel, several optimizers, a data loader without a state, whatever
            `watch` refuses.
    """
    if len(trainer.model_parts) != 1:
        raise invalid("model parts", len(trainer.model_parts), "one: no pipeline parallel")
    optimizers = list(trainer.optimizers)
    if len(optimizers) != 1:
        raise invalid("optimizers", len(optimizers), "one", "watch(...) takes one of several")
    model = trainer.model_parts[0]
    device = next(model.parameters()).device
    leads = not several_processes() or dist.get_rank() == 0
    own = options.pop("sinks", ())
    sinks = [MetricsLogger(trainer.metrics_processor), *own] if leads else []
    return watch(
        model,
        trainer.loss_fn,
        list(data) if data is not None else _first_batches(trainer.dataloader, device),
        optimizers[0],
        k=k,
        sinks=sinks,
        quiet=options.pop("quiet", True),
        group=options.pop("group", dist.group.WORLD if several_processes() else None),
        resume_at=trainer.step or None,
        **options,
    )


def _first_batches(loader: Any, device: torch.device) -> list[Batch]:
    """The next batches of a loader that saves and restores where it stands."""
    if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        hint = "give batches of your own: data=[(tokens, labels), ...]"
        raise invalid("data loader", type(loader).__name__, "one with a state", hint)
    state = loader.state_dict()
    with undisturbed(device):
        taken = list(islice(iter(loader), BATCHES))
    loader.load_state_dict(state)
    return [(_tokens(inputs).to(device), labels.to(device)) for inputs, labels in taken]


def _tokens(inputs: Any) -> Tensor:
    """What the model takes: the entry "input" of the loader's dict, which has nothing else."""
    if isinstance(inputs, Tensor):
        return inputs
    if not isinstance(inputs, Mapping) or set(inputs) != {"input"}:
        given = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        hint = "give batches of your own: data=[(tokens, labels), ...]"
        raise invalid("inputs of the data loader", given, "a dict with 'input' alone", hint)
    return inputs["input"]
