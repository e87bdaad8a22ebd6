"""Do runs that are planned and that nobody is at work on: a worker, one of many perhaps.

A worker knows the folder of a study or a sweep and nothing else, so that it can be started anywhere
that sees the folder: by a queue, in a container, on another machine. Workers share the runs by the
locks of the runs' folders; each goes on where one that was killed has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thalweg.errors import invalid
from thalweg.lab.config import Spec
from thalweg.lab.execution.launched import refuse_sharing
from thalweg.lab.execution.machine import resolve_device
from thalweg.lab.execution.schedule import Executor, Outcome, Task, run_tasks
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.means import Means
from thalweg.lab.preparing import read_spec
from thalweg.lab.progress import Progress
from thalweg.lab.sharing import device_in, tasks_in_folder
from thalweg.lab.store import StudyFolder, open_study
from thalweg.lab.store.durable import full_disk_told
from thalweg.lab.store.verifying import read_run_table
from thalweg.lab.sweeps.folder import find_sweep, is_sweep
from thalweg.registry import load_plugin


def work(
    name: str | Path,
    *,
    root: Path | str = "runs",
    seeds: Sequence[int] | None = None,
    workers: int = 1,
    plugins: Sequence[str] = (),
    executor: str | Executor = "local",
    progress: Progress | None = None,
    retries: int = 0,
    hung_after: float = HUNG_AFTER,
) -> Outcome:
    """Do the runs of a study or a sweep that are not done, until none is left.

    Runs that another process is at work on are waited for, and gone on with where that one is
    killed. Nothing is judged or drawn: `resume` and `report` do that.

    Args:
        name: of the study or sweep: its folder, its name below `root`, or its beginning.
        seeds: those whose runs are done; default: all.
        workers: processes side by side.
        root, plugins, executor, progress, retries, hung_after: see `lab.run`.

    Raises:
        InvalidInput: there is no such study or sweep, it has not been planned, this machine does
            not have the device that it was planned for, or its runs are shared by processes.
    """
    for plugin in plugins:
        load_plugin(plugin)
    progress = progress or Progress.silent()
    means = Means(workers, plugins, executor, progress, retries, hung_after)
    folder, specs = _found(name, root)
    tasks: list[Task] = []
    for study, spec in specs:
        refuse_sharing(spec, "work")
        chosen = spec.seeds if seeds is None else [s for s in spec.seeds if s in seeds]
        tasks += tasks_in_folder(study, spec, chosen)
    if not tasks:
        known = sorted({seed for _, spec in specs for seed in spec.seeds})
        raise invalid("seed", seeds, "one of " + ", ".join(map(str, known)))
    with full_disk_told(folder):
        return run_tasks(
            StudyFolder(folder),
            tasks,
            workers=workers,
            device=resolve_device(_planned_device(tasks[0])),
            threads=specs[0][1].threads,
            plugins=means.plugins,
            executor=executor,
            say=means.progress.warn,
            retries=means.retries,
            hung_after=means.hung_after,
        )


def _planned_device(task: Task) -> str:
    """The device that the runs were planned for, whatever "auto" means on this machine."""
    assert task.study is not None
    table = read_run_table(StudyFolder(task.study).run(task.seed, task.branch))
    return device_in(str(table["maker"]))


def _found(name: str | Path, root: Path | str) -> tuple[Path, list[tuple[StudyFolder, Spec]]]:
    """The folder of a study or sweep, and its studies with their specs."""
    if is_sweep(name, root):
        sweep = find_sweep(name, root)
        return sweep.path, [(point.study, read_spec(point.study)) for point in sweep.points]
    study = open_study(name, root)
    return study.path, [(study, read_spec(study))]
