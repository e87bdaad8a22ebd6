"""Curvature in a Lightning run, by one entry in a list:

    Trainer(callbacks=[CurvatureCallback()])

Sharpness, stability margin and where the updates go, at the steps of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from thalweg.errors import invalid, require_extra
from thalweg.integrations.fixed_sample import fixed_sample
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.reduce import several_processes
from thalweg.measure.sinks import Sink
from thalweg.measure.watch import watch
from thalweg.measure.watcher import Watcher

require_extra("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

SAMPLES = 64
"""That are watched."""
LOGGERS = {
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
}
"""The sinks of Lightning's own loggers, by their class; TensorBoard's needs its folder."""
REFUSED = {
    "FSDPStrategy": "FSDP 1",
    "DeepSpeedStrategy": "DeepSpeed ZeRO",
}


class CurvatureCallback(Callback):
    """Reports the curvature of a module's loss while it trains, and leaves the training alone.

    The loss is that of `training_step`, over a sample of the training set that is drawn once and
    collated as the loader collates. See `watch` for what is reported, what it costs and what
    happens when a report fails. With several processes each watches its part of the sample. The
    state goes into Lightning's checkpoints, and a resumed run goes on from there.

    Args:
        optimizer: which one of several, by its place in `configure_optimizers`.
        loss: `loss(module, batch)` in the place of `training_step`; needed where that makes the
            steps itself (manual optimization).
        samples: watched, over all processes.
        data: batches to watch in their place.
        k: dimension of the dominant subspace; None for the number of classes, where the module's
            own output, `module(batch[0])`, is (n, classes): give it otherwise.
        sinks: where rows go; None for those of the trainer's loggers.
        quiet: write nothing to the console.
        seed: of the sample, and as for `watch`.
        options: further ones of `watch`, such as `budget`, `every`, `probes`, `file`.

    Attributes:
        watcher: the `Watcher`, once the training has begun; `watcher.history` has the rows.

    Raises:
        InvalidInput: when the training begins: FSDP 1 or DeepSpeed; manual optimization without
            a loss; a training set without a length; whatever `watch` refuses.
    """

    def __init__(
        self,
        *,
        optimizer: int = 0,
        loss: Callable[[Any, Any], Any] | None = None,
        samples: int = SAMPLES,
        data: object = None,
        k: int | None = None,
        sinks: Iterable[Sink | str | Callable[[Any, int], Any]] | None = None,
        quiet: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.optimizer, self.loss = optimizer, loss
        self.samples, self.data, self.k, self.seed = samples, data, k, seed
        self.sinks, self.quiet, self.options = sinks, quiet, options
        self.watcher: Watcher | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        _refuse_layouts(trainer)
        if self.loss is None and not pl_module.automatic_optimization:
            hint = "its training_step makes the steps itself"
            raise invalid("loss", None, "loss(module, batch) with manual optimization", hint)
        group = dist.group.WORLD if several_processes() else None
        first, resumed = trainer.is_global_zero, self._restored is not None
        data = self.data
        if data is None:
            loader, device = trainer.train_dataloader, pl_module.device
            data = fixed_sample(loader, self.samples, self.seed, device, group)
        sinks = list(_loggers(trainer) if self.sinks is None else self.sinks) if first else []
        options = dict(self.options) if first else {**self.options, "file": None}
        self.watcher = watch(
            pl_module,
            ComputeLoss(self._loss),  # type: ignore[arg-type]
            data,
            trainer.optimizers[self.optimizer],
            k=self.k,
            sinks=sinks,
            quiet=self.quiet or not first,
            seed=self.seed,
            group=group,
            resume_at=self._restored["step"] if resumed else None,  # type: ignore[index]
            **options,
        )
        if self._restored is not None:
            self.watcher.load_state_dict(self._restored)
            self._restored = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching; `watcher.history` stays."""
        if self.watcher is not None:
            self.watcher.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop watching a training that has failed."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The watcher's state, for Lightning's checkpoint."""
        return {} if self.watcher is None else self.watcher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the training begins."""
        self._restored = state_dict or None

    def _loss(self, module: nn.Module, batch: Any) -> Any:
        if self.loss is not None:
            return self.loss(module, batch)
        with _nothing_logged(module):
            return _training_step(module, batch)


def _training_step(module: Any, batch: Any) -> Any:
    """The loss of `training_step`, with its arguments as far as it takes them."""
    step = type(module).training_step
    names = step.__code__.co_varnames[1 : step.__code__.co_argcount]
    places = {"batch_idx": 0, "dataloader_idx": 0}
    return module.training_step(batch, *(places[name] for name in names[1:] if name in places))


@contextmanager
def _nothing_logged(module: Any) -> Any:
    """What an evaluation of ours logs belongs to no step of the training."""
    names = ("log", "log_dict", "print")
    for name in names:
        object.__setattr__(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(module, name)


def _loggers(trainer: Trainer) -> list[str]:
    """The sinks of the trainer's own loggers."""
    found = []
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        name = LOGGERS.get(type(logger).__name__)
        if name == "tensorboard":
            found.append(f"tensorboard:{logger.log_dir}")
        elif name is not None:
            _ = logger.experiment  # begins its run, which the sink then finds
            found.append(name)
    return found


def _refuse_layouts(trainer: Trainer) -> None:
    """Raise where parameters are divided in a way that products do not know."""
    name = type(trainer.strategy).__name__
    if name in REFUSED:
        allowed = "one process, DDP or FSDP 2 (ModelParallelStrategy)"
        raise invalid("strategy", REFUSED[name], allowed)
