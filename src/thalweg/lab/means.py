"""With what are the runs of a study, or of a sweep, run?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from thalweg.errors import invalid
from thalweg.lab.execution.schedule import Executor, check_options
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.progress import Progress


@dataclass(frozen=True)
class Means:
    """With what runs are run; see `lab.run`, and `lab.sweep` for the executor's options.

    Raises:
        InvalidInput: no worker, a negative number of retries or time, an unknown
            executor, or an option that it does not take.
    """

    workers: int | None = None
    plugins: Sequence[str] = ()
    executor: str | Executor | None = None
    progress: Progress = field(default_factory=Progress.silent)
    retries: int = 0
    hung_after: float = HUNG_AFTER
    executor_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise invalid("workers", self.workers, "an integer >= 1")
        if self.retries < 0:
            raise invalid("retries", self.retries, "an integer >= 0")
        if not 0 <= self.hung_after < inf:
            raise invalid("hung_after", self.hung_after, "minutes, or 0 for never")
        if self.executor is not None or self.executor_options:
            # What runs by default, "local" or "lockstep", takes none.
            check_options(self.executor or "local", self.executor_options)

    def refuse_side_by_side(self) -> None:
        """Refuse what runs of processes that share them cannot have.

        Raises:
            InvalidInput: several workers, another executor.
        """
        if self.executor is not None:
            hint = "processes that a launcher has started make one run after another"
            raise invalid("executor", self.executor, "None", hint)
        if (self.workers or 1) > 1:
            hint = "the processes share one run after another"
            raise invalid("workers", self.workers, "1 under a launcher such as torchrun", hint)
