"""Curvature in a run of the Hugging Face `Trainer`, by one line:

    trainer.add_callback(CurvatureCallback(trainer))

Sharpness, stability margin and where the updates go are then in the dashboards of the trainer's
`report_to`, at its own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thalweg.errors import invalid, require_extra
from thalweg.integrations.fixed_sample import fixed_sample
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.reduce import several_processes
from thalweg.measure.sinks import Sink
from thalweg.measure.watch import watch
from thalweg.measure.watcher import Watcher

require_extra("huggingface", "transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402

SAMPLES = 64
"""That are watched."""
EIGENVECTORS = 4
"""k, where the model is no classifier."""
SINKS = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""The sinks of what `report_to` names; TensorBoard's needs its folder."""


class CurvatureCallback(TrainerCallback):
    """Reports the curvature of a `Trainer`'s loss while it trains, and leaves the training alone.

    The loss is the trainer's own (`compute_loss`: label smoothing, losses of your own), over a
    sample of its training set that is drawn once and collated as it collates. The optimizer is
    found by itself. See `watch` for what is reported, what it costs and what happens when a report
    fails. With several processes each watches its part of the sample, and all report together. The
    state goes into the trainer's checkpoints: a resumed run reports as if it had not been stopped.

    Args:
        trainer: whose loss is watched; None for that which the model itself returns.
        samples: watched, over all processes.
        data: batches to watch in their place.
        k: dimension of the dominant subspace; None for the number of labels of a classifier, and
            for `EIGENVECTORS` of another model.
        sinks: where rows go; None for the dashboards of `report_to`.
        quiet: write nothing to the console.
        seed: of the sample, and as for `watch`.
        options: further ones of `watch`, such as `budget`, `every`, `probes`, `file`.

    Attributes:
        watcher: the `Watcher`, once the training has begun; `watcher.history` has the rows.

    Raises:
        InvalidInput: when the training begins: FSDP 1 or DeepSpeed, a training set without a
            length, whatever `watch` refuses.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        samples: int = SAMPLES,
        data: object = None,
        k: int | None = None,
        sinks: Iterable[Sink | str | Callable[[Any, int], Any]] | None = None,
        quiet: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.trainer = trainer
        self.samples, self.data, self.k, self.seed = samples, data, k, seed
        self.sinks, self.quiet, self.options = sinks, quiet, options
        self.watcher: Watcher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        _refuse_layouts(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        loader = kwargs.get("train_dataloader")
        group = dist.group.WORLD if several_processes() else None
        first, resumed = state.is_world_process_zero, state.global_step > 0
        data = self.data
        if data is None:
            data = fixed_sample(loader, self.samples, self.seed, model.device, group)
        sinks = list(_dashboards(args) if self.sinks is None else self.sinks) if first else []
        options = dict(self.options) if first else {**self.options, "file": None}
        if "threshold" not in options:
            options["k"] = _dimension(model) if self.k is None else self.k
        self.watcher = watch(
            model,
            None if self.trainer is None else ComputeLoss(self._loss),  # type: ignore[arg-type]
            data,
            optimizer,
            sinks=sinks,
            quiet=self.quiet or not first,
            seed=self.seed,
            group=group,
            resume_at=state.global_step if resumed else None,
            **options,
        )
        saved = self._saved(args, state)
        if resumed and saved.is_file():
            self.watcher.load_state_dict(torch.load(saved, weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state beside the trainer's own, in a file for each process."""
        saved = self._saved(args, state)
        if self.watcher is not None and saved.parent.is_dir():
            torch.save(self.watcher.state_dict(), saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching; `watcher.history` stays."""
        if self.watcher is not None:
            self.watcher.close()

    def _loss(self, model: torch.nn.Module, batch: Any) -> Any:
        assert self.trainer is not None
        return self.trainer.compute_loss(model, dict(batch))

    def _saved(self, args: Any, state: Any) -> Path:
        rank = dist.get_rank() if several_processes() else 0
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return folder / f"thalweg-{rank}.pt"


def _dimension(model: Any) -> int:
    """The number of labels of a classifier of whole inputs; `EIGENVECTORS` else."""
    name = type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    whole = "Classification" in name and "TokenClassification" not in name
    return labels if whole and isinstance(labels, int) and labels > 1 else EIGENVECTORS


def _dashboards(args: Any) -> list[str]:
    """The sinks of the trainer's own dashboards."""
    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    found = [SINKS[name] for name in names if name in SINKS]
    if "tensorboard" in names:
        folder = getattr(args, "logging_dir", None) or Path(args.output_dir) / "runs"
        found.append(f"tensorboard:{folder}")
    return found


def _refuse_layouts(args: Any) -> None:
    """Raise where parameters are divided in a way that products do not know."""
    if getattr(args, "deepspeed", None):
        raise invalid("deepspeed", "DeepSpeed ZeRO", "one process, DDP or FSDP 2", "fsdp_version=2")
    version = (getattr(args, "fsdp_config", None) or {}).get("fsdp_version", 1)
    if getattr(args, "fsdp", None) and int(version) == 1:
        raise invalid("fsdp", "FSDP 1", "FSDP 2", "fsdp_config={'fsdp_version': 2}")
