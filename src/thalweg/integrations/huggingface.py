"""Curvature in a run of the Hugging Face `Trainer`, by one line:

    trainer.add_callback(CurvatureCallback(trainer))

Sharpness, stability margin and where the updates go are then in the dashboards of the trainer's
`report_to`, at its own steps.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from thalweg.errors import invalid, require_extra
from thalweg.integrations.trainer_callback import SAMPLES, AnySink, WatchingCallback
from thalweg.loss.attributes import Attributes
from thalweg.loss.compute_loss import ComputeLoss

require_extra("huggingface", "transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402

EIGENVECTORS = 4
"""k, where the model is no classifier."""
SINKS = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""The sinks of what `report_to` names; TensorBoard's needs its folder."""


class CurvatureCallback(WatchingCallback, TrainerCallback):
    """Reports the curvature of a `Trainer`'s loss while it trains, and leaves the training alone.

    The loss is the trainer's own (`compute_loss`: label smoothing, losses of your own), over a
    sample of its training set that is drawn once and collated as it collates. The optimizer is
    found by itself. See `watch` for what is reported, what it costs and what happens when a report
    fails. With several processes (DDP, FSDP 2) each watches its part of the sample, and all report
    together. The state goes into the trainer's checkpoints: a resumed run reports as if it had not
    been stopped, wherever the checkpoint is that `train` was given.

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
        sinks: Iterable[AnySink] | None = None,
        quiet: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            samples=samples, data=data, k=k, sinks=sinks, quiet=quiet, seed=seed, **options
        )
        self.trainer = trainer
        self._resumed_from: Any = None
        if trainer is not None:
            self._hear_of(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        # The second is what a configuration of accelerate leaves.
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            allowed = "one process, DDP or FSDP 2"
            raise invalid("deepspeed", "DeepSpeed ZeRO", allowed, "fsdp_config={'version': 2}")
        model, resumed = kwargs["model"], state.global_step > 0
        self.begin(
            model,
            None if self.trainer is None else ComputeLoss(self._loss),
            kwargs["optimizer"],
            kwargs.get("train_dataloader"),
            dashboards=lambda: _dashboards(args),
            usual_k=_dimension(model),
            resume_at=state.global_step if resumed else None,
        )
        if resumed:
            self.restore_from(self._checkpoint_read(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the first batch of a step: a compiled model runs no hooks."""
        if self.watcher is not None:
            self.watcher.note_samples(state.train_batch_size or args.train_batch_size)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the next batch of a step that accumulates."""
        self.on_step_begin(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state beside the trainer's own, in a file for each process."""
        self.save_to(_checkpoint(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching; `watcher.history` stays."""
        self.end()

    def _loss(self, model: torch.nn.Module, batch: Any) -> Any:
        assert self.trainer is not None
        # Trainers count and log in attributes of their own, as TRL's do.
        before = Attributes([self.trainer])
        try:
            return self.trainer.compute_loss(model, dict(batch))
        finally:
            before.put_back()

    def _hear_of(self, trainer: Trainer) -> None:
        """Note what `train` resumes from, and end where it fails: callbacks are told of neither."""
        train = trainer.train

        @functools.wraps(train)
        def heard(*arguments: Any, **options: Any) -> Any:
            self._resumed_from = options.get("resume_from_checkpoint", *arguments[:1])
            try:
                return train(*arguments, **options)
            except BaseException:
                self.end()
                raise

        trainer.train = heard

    def _checkpoint_read(self, args: Any, state: Any) -> Path:
        """The folder that the training resumes from, as far as it is known."""
        for given in (self._resumed_from, getattr(args, "resume_from_checkpoint", None)):
            if isinstance(given, str | os.PathLike) and Path(given).is_dir():
                return Path(given)
        return _checkpoint(args, state)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of the trainer's checkpoint at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


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
