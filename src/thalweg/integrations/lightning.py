"""Curvature in a Lightning run, by one entry in a list:

    Trainer(callbacks=[CurvatureCallback()])

Sharpness, stability margin and where the updates go, at the steps of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from thalweg.errors import invalid, require_extra
from thalweg.integrations.trainer_callback import SAMPLES, AnySink, WatchingCallback
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.measure.sinks import reason_of, warn
from thalweg.measure.training_samples import samples_in
from thalweg.sharding import sharding_of

require_extra("lightning", "lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature  # noqa: E402

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


class CurvatureCallback(WatchingCallback, Callback):
    """Reports the curvature of a module's loss while it trains, and leaves the training alone.

    The loss is that of `training_step`, over a sample of the training set that is drawn once,
    collated as the loader collates, and put through the module's hooks for batches. See `watch` for
    what is reported, what it costs and what happens when a report fails. With several processes
    (ddp, FSDP 2 by `ModelParallelStrategy`) each watches its part of the sample. The state goes
    into Lightning's checkpoints, of a model in shards a file for each process, and a resumed run
    goes on from there.

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
        sinks: Iterable[AnySink] | None = None,
        quiet: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(
            samples=samples, data=data, k=k, sinks=sinks, quiet=quiet, seed=seed, **options
        )
        self.optimizer, self.loss = optimizer, loss
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        _refuse_layouts(trainer)
        if self.loss is None and not pl_module.automatic_optimization:
            hint = "its training_step makes the steps itself"
            raise invalid("loss", None, "loss(module, batch) with manual optimization", hint)
        restored, self._restored = self._restored, None
        watcher = self.begin(
            pl_module,
            ComputeLoss(self._loss),
            trainer.optimizers[self.optimizer],
            trainer.train_dataloader,
            dashboards=lambda: _loggers(trainer),
            resume_at=None if restored is None else restored["step"],
            prepare=lambda batch: _prepared(trainer, batch),
        )
        if sharding_of(watcher.objective) is not None:
            self._save_beside(trainer.strategy)
        if restored is None:
            return
        if "source" in restored:
            self.restore(lambda: restored)
        else:
            self.restore_from(Path(trainer.ckpt_path or ""))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch: many a `training_step` calls parts of its module alone."""
        if self.watcher is not None:
            self.watcher.note_samples(samples_in(batch))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching; `watcher.history` stays."""
        self.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop watching a training that has failed."""
        self.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the strategy as it was."""
        vars(trainer.strategy).pop("save_checkpoint", None)

    def state_dict(self) -> dict[str, Any]:
        """The watcher's state, for Lightning's checkpoint; its step alone, of a model in shards."""
        if self.watcher is None:
            return {}
        if sharding_of(self.watcher.objective) is not None:
            return {"step": self.watcher.step}
        return self.watcher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the training begins."""
        self._restored = state_dict or None

    def _save_beside(self, strategy: Any) -> None:
        """Write this process's state beside each checkpoint of a model in shards.

        Of what callbacks give Lightning saves that of the first process alone.

        Warns:
            WatchWarning: the checkpoint is a file, not a folder; the state cannot be written.
        """
        save = strategy.save_checkpoint

        def saved(checkpoint: Any, filepath: Any, *arguments: Any, **options: Any) -> None:
            save(checkpoint, filepath, *arguments, **options)
            path = Path(strategy.broadcast(filepath))
            if path.is_file() and strategy.is_global_zero:
                warn(
                    "a checkpoint in one file has no room for the watcher's state: a resumed run"
                    " begins with a new subspace; leave save_distributed_checkpoint=True"
                )
            try:
                self.save_to(path)
            except (OSError, RuntimeError) as error:
                warn(f"the watcher's state is not saved: {reason_of(error)}")

        strategy.save_checkpoint = saved

    def _loss(self, module: nn.Module, batch: Any) -> Any:
        if self.loss is not None:
            return self.loss(module, batch)
        with _nothing_logged(module):
            return _training_step(module, batch)


def _training_step(module: Any, batch: Any) -> Any:
    """The loss of `training_step`, with its arguments as Lightning gives them."""
    step = module.training_step
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return step(batch, 0) if numbered else step(batch)


def _prepared(trainer: Any, batch: Any) -> Any:
    """What Lightning does to a batch before `training_step`: its dtype, the module's own hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


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
