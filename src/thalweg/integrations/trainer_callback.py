"""What the callbacks of all trainers do alike: a fixed sample, sinks, processes, resuming, the end.

A callback of a trainer's own kind inherits `WatchingCallback`, and says where that trainer has its
model, loss, optimizer, loader, dashboards and checkpoints.

Example:
    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> data = TensorDataset(torch.randn(20, 3), torch.randn(20, 2))
    >>> callback = WatchingCallback(samples=8)
    >>> callback.begin(model, torch.nn.MSELoss(), optimizer, DataLoader(data), usual_k=1)
    Watcher(watching, every=None, step=0, reports=0)
    >>> callback.end()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thalweg.errors import InvalidInput, invalid
from thalweg.integrations.fixed_sample import fixed_sample
from thalweg.loss.reduce import group_of_all, reduction_in
from thalweg.measure.sinks import Sink, reason_of, warn
from thalweg.measure.watch import watch
from thalweg.measure.watcher import Watcher

SAMPLES = 64
"""That are watched."""

AnySink = Sink | str | Callable[[Any, int], Any]


class WatchingCallback:
    """Watches a trainer's loss, from the beginning of its training to the end.

    Args:
        samples: watched, over all processes.
        data: batches to watch in their place.
        k: dimension of the dominant subspace; None for the trainer's usual one, or for a threshold.
        sinks: where rows go; None for the trainer's dashboards.
        quiet: write nothing to the console.
        seed: of the sample, and as for `watch`.
        options: further ones of `watch`.

    Attributes:
        watcher: the `Watcher`, once the training has begun.
    """

    def __init__(
        self,
        *,
        samples: int = SAMPLES,
        data: object = None,
        k: int | None = None,
        sinks: Iterable[AnySink] | None = None,
        quiet: bool = True,
        seed: int | None = 0,
        **options: Any,
    ) -> None:
        self.samples, self.data, self.k, self.seed = samples, data, k, seed
        self.sinks, self.quiet, self.options = sinks, quiet, options
        self.watcher: Watcher | None = None

    def begin(
        self,
        model: torch.nn.Module,
        loss: Any,
        optimizer: Any,
        loader: Any = None,
        *,
        dashboards: Callable[[], Iterable[AnySink]] = tuple,
        usual_k: int | None = None,
        resume_at: int | None = None,
        prepare: Callable[[Any], Any] = lambda batch: batch,
    ) -> Watcher:
        """Begin to watch; once more where a training begins again that has not come to its end.

        The rows of the first try then make room for those of the next.

        Args:
            model, loss, optimizer, resume_at: as for `watch`.
            loader: of the training set; not looked at where the data are given.
            dashboards: gives the sinks of the trainer's own; asked on the first process alone.
            usual_k: where neither k nor a threshold is given; None leaves it to `watch`.
            prepare: what the trainer does to a batch before the loss gets it.

        Raises:
            InvalidInput: see `fixed_sample` and `watch`.
        """
        if self.watcher is not None and not self.watcher.closed:
            self.end()
            resume_at = resume_at or 0
        options = {"group": group_of_all(), **self.options}
        group, data, k = options["group"], self.data, self.k
        if data is None:
            device = next(model.parameters()).device
            data = fixed_sample(loader, self.samples, self.seed or 0, device, group, prepare)
        if k is None and options.get("threshold") is None:
            k = usual_k
        # A logger that is asked begins its run.
        leads = group is None or dist.get_rank(group) == 0
        sinks = (dashboards() if self.sinks is None else self.sinks) if leads else ()
        self.watcher = watch(
            model,
            loss,
            data,
            optimizer,
            k=k,
            sinks=list(sinks),
            quiet=self.quiet,
            seed=self.seed,
            resume_at=resume_at,
            **options,
        )
        return self.watcher

    def restore(
        self, read: Callable[[], Mapping[str, Any] | None], where: str = "the checkpoint"
    ) -> None:
        """Go on from a state, on all processes; where one cannot, all begin with a new subspace.

        Args:
            read: gives what the watcher's `state_dict()` was; None where nothing was saved.
            where: it should be, in words.

        Warns:
            WatchWarning: it is not there, cannot be read, or is of another step, model or number
                of processes.
        """
        assert self.watcher is not None
        watcher, reduction = self.watcher, reduction_in(self.watcher.objective)
        without = watcher.state_dict()
        try:
            with reduction.together():
                state = read()
                if state is None:
                    raise InvalidInput(f"{where} has none, as where the run was not watched before")
                if state["step"] != watcher.step:
                    raise invalid("step of the saved state", state["step"], str(watcher.step))
                watcher.load_state_dict(state)
        except Exception as error:
            watcher.load_state_dict(without)
            if reduction.rank == 0:
                why = reason_of(error)
                warn(f"the state of the resumed run is not read, its subspace is new: {why}")

    def save_to(self, folder: Path) -> None:
        """Write this process's state to a file of its own in a trainer's checkpoint."""
        if self.watcher is not None and folder.is_dir():
            torch.save(self.watcher.state_dict(), self._file_in(folder))

    def restore_from(self, folder: Path) -> None:
        """Go on from what `save_to` has written; see `restore`."""
        file = self._file_in(folder)
        self.restore(
            lambda: torch.load(file, weights_only=True) if file.is_file() else None, str(folder)
        )

    def end(self) -> None:
        """Stop watching; `watcher.history` stays."""
        if self.watcher is not None:
            self.watcher.close()

    def _file_in(self, folder: Path) -> Path:
        rank = 0 if self.watcher is None else reduction_in(self.watcher.objective).rank
        return folder / f"thalweg-{rank}.pt"
