"""What does a study leave on disk, and where is it?

    runs/<study>/             spec.toml  env.json  verdicts.json  report.html  figures/
        seed-0/trunk/         run.toml  status.json  log.txt  metrics/  checkpoints/
        seed-0/bulk-sgd/      ...

All of it is text, Parquet and safetensors: readable without Thalweg, also while a run continues.

Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     study = StudyFolder.create(root, "main-digits-0123abcd", "k = 10\\n")
    ...     run = study.run(0, "trunk").create("seed = 0\\n")
    ...     run.write_status(Status("waiting"))
    ...     [(run.seed, run.branch, run.status().state) for run in study.runs()]
    [(0, 'trunk', 'waiting')]
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.environment import environment
from thalweg.errors import IntegrityError, InvalidInput, ThalwegError, invalid, unknown_name
from thalweg.lab.store import durable
from thalweg.lab.store.links import (
    describe_foreign,
    foreign_entries,
    leads_outside,
    open_plain,
    refuse_foreign_entries,
)
from thalweg.lab.store.lock import is_locked, locked
from thalweg.lab.store.metrics import read_metrics
from thalweg.lab.store.status import Status, read_status, utc_now, write_status
from thalweg.lab.tables import parse_toml
from thalweg.limits import read_bytes

if TYPE_CHECKING:
    import pyarrow

TRUNK = "trunk"
"""Name of the run that all branches of a seed start from."""

_SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: one seed of one branch."""

    path: Path

    @property
    def seed(self) -> int:
        """The seed, from the folder's place."""
        match = _SEED.fullmatch(self.path.parent.name)
        if match is None:
            raise invalid("run folder", str(self.path), "<study>/seed-<number>/<branch>")
        return int(match[1])

    @property
    def branch(self) -> str:
        """The branch's name; "trunk" for what all branches start from."""
        return self.path.name

    @property
    def metrics(self) -> Path:
        """The folder of the table, for `MetricsWriter` and `read_metrics`."""
        return self.path / "metrics"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, for `save_checkpoint` and `latest_checkpoint`."""
        return self.path / "checkpoints"

    @property
    def bases(self) -> Path:
        """The folder of the saved bases."""
        return self.path / "bases"

    @property
    def phase_request(self) -> Path:
        """A file that asks the run to end its current phase."""
        return self.path / "end-phase"

    def create(self, run_text: str) -> RunFolder:
        """Create the folder with its `run.toml`, or open it if it holds just that already.

        Raises:
            InvalidInput: it holds another run.
        """
        durable.make_folder(self.path)
        file = self.path / "run.toml"
        if file.is_file() and file.read_text(encoding="utf-8") != run_text:
            raise InvalidInput(
                f"run folder {self.path}: holds a run with other settings (see {file}); nothing is "
                "overwritten: choose another study name, or move that folder away"
            )
        if not file.is_file():
            durable.write_file(file, run_text)
        return self

    @property
    def run_text(self) -> str:
        """The text of `run.toml`."""
        return _read_text(self.path / "run.toml")

    def write_run_text(self, run_text: str) -> None:
        """Replace `run.toml`, as for a run that is extended."""
        durable.write_file(self.path / "run.toml", run_text)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock while writing to it; also tidies what a killed process left.

        Raises:
            InvalidInput: another process is at work on this run.
        """
        durable.make_folder(self.path)
        with locked(self.path):
            durable.remove_unfinished(self.path)
            yield

    def write_status(self, status: Status) -> None:
        """Replace `status.json`."""
        write_status(self.path / "status.json", status)

    def status(self) -> Status | None:
        """Return where the run stands; None before it has said anything.

        A run that calls itself running while no process holds its lock was killed: it is returned
        as interrupted.
        """
        status = read_status(self.path / "status.json")
        if status and status.state == "running" and not is_locked(self.path):
            # Read again: it may have ended properly between the two looks.
            status = read_status(self.path / "status.json")
            if status and status.state == "running":
                said = f"process {status.pid} on {status.host} ended without a word"
                return replace(status, state="interrupted", message=status.message or said)
        return status

    def state(self) -> str:
        """Where the run stands, in a word: also "waiting" before it begins, and "damaged"."""
        try:
            status = self.status()
        except (ThalwegError, OSError):
            return "damaged"
        return "waiting" if status is None else status.state

    def followed(self) -> RunFolder:
        """The same folder for a process that reads along while another one writes."""
        return _FollowedFolder(self.path)

    def log(self, message: str) -> None:
        """Append to `log.txt`, with the time in UTC; further lines of a message are indented.

        A line that was cut short, by a kill or a full disk, is closed first.
        """
        path = self.path / "log.txt"
        line = f"{utc_now()} " + message.rstrip().replace("\n", "\n    ") + "\n"
        with durable.storage_errors(self.path, len(line), path):
            descriptor = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            with os.fdopen(descriptor, "rb+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())

    @property
    def hash(self) -> str:
        """The hash of the run that `run.toml` names; empty where it names none."""
        return self._said("run_hash")

    @property
    def data_fingerprint(self) -> str:
        """The fingerprint of the data that `run.toml` names; empty where it names none."""
        return self._said("data_fingerprint")

    def _said(self, key: str) -> str:
        try:
            return str(parse_toml(self.run_text, "run.toml").get(key, ""))
        except ValueError:  # `InvalidInput` is one
            return ""

    def require_own_place(self, table: Mapping[str, Any]) -> None:
        """Check that what `run.toml` holds is about the run that the folder stands for.

        Raises:
            IntegrityError: it is another run's.
        """
        found = (table.get("seed"), table.get("branch"))
        if None not in found and found != (self.seed, self.branch):
            raise IntegrityError(
                f"{self.path / 'run.toml'}: is that of seed {found[0]} {found[1]}: folders were"
                " exchanged; put them back"
            )

    def read_metrics(self) -> pyarrow.Table:
        """Return the table of the sealed rows so far.

        Raises:
            IntegrityError: a segment is damaged, missing, or of another run; the folder is.
        """
        with suppress(ValueError):  # of a `run.toml` that is none, metrics tell enough
            self.require_own_place(parse_toml(self.run_text, "run.toml"))
        table = read_metrics(self.metrics, self.hash)
        status = self.status()
        is_short = status and status.state == "done" and status.rows not in (None, len(table))
        # Read again: it may have been extended between the two looks.
        if status and is_short and not is_locked(self.path) and status == self.status():
            raise IntegrityError(
                f"{self.metrics}: {len(table)} of {status.rows} measured rows are there; to go back"
                " to the run's newest good state: thalweg check STUDY --repair"
            )
        return table


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study: a resolved spec and the runs made with it."""

    path: Path

    @classmethod
    def create(cls, root: Path | str, name: str, spec_text: str) -> StudyFolder:
        """Create the folder with `spec.toml` and `env.json`, or open it; nothing is overwritten.

        Raises:
            InvalidInput: the name cannot be a folder's, or `root` cannot be written to.
        """
        study = cls(Path(root) / durable.check_name("study name", name))
        durable.make_folder(study.path)
        if not study.exists:
            study.write_spec_text(spec_text)
        study.record_environment()
        return study

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def spec_file(self) -> Path:
        """The file of the resolved spec, `spec.toml`."""
        return self.path / "spec.toml"

    @property
    def exists(self) -> bool:
        """Whether there is such a study: a folder with a spec."""
        return self.spec_file.is_file()

    @property
    def spec_text(self) -> str:
        """The text of `spec.toml`."""
        return _read_text(self.spec_file)

    def write_spec_text(self, spec_text: str) -> None:
        """Replace `spec.toml`, as when seeds or steps are added."""
        durable.write_file(self.spec_file, spec_text)

    def record_environment(self) -> None:
        """Write `env.json`: the environment now, and the different ones of earlier sittings."""
        now = environment()
        known = self.environments()
        if not known or known[-1] != now:
            earlier = [item for item in known if item != now]
            content = durable.to_json({**now, "earlier": earlier})
            durable.write_file(self.path / "env.json", content)

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments that the study was run in, the latest last."""
        file = self.path / "env.json"
        if not file.is_file():
            return []
        latest = durable.read_json(file)
        earlier = latest.pop("earlier", []) if isinstance(latest, dict) else None
        if not (isinstance(earlier, list) and all(isinstance(item, dict) for item in earlier)):
            raise IntegrityError(f"{file}: damaged, not an object with a list of earlier ones")
        return [*earlier, latest]

    def write_verdicts(self, verdicts: Any) -> None:
        """Replace `verdicts.json`; `verdicts` is anything that JSON takes."""
        durable.write_file(self.path / "verdicts.json", durable.to_json(verdicts))

    def read_verdicts(self) -> Any:
        """Return what `verdicts.json` holds; None if there is none yet.

        Raises:
            IntegrityError: it is not a list of verdicts.
        """
        file = self.path / "verdicts.json"
        if not file.is_file():
            return None
        found = durable.read_json(file)
        if not (isinstance(found, list) and all(_is_verdict(verdict) for verdict in found)):
            raise IntegrityError(f"{file}: damaged, not a list of verdicts; make the report anew")
        return found

    def known_verdicts(self) -> list[dict[str, Any]]:
        """Return the verdicts there are; none where the file is damaged, for looking at many."""
        try:
            found = self.read_verdicts()
        except (IntegrityError, OSError):
            return []
        complete = {"claim", "outcome"}
        listed = found if isinstance(found, list) else []
        return [one for one in listed if isinstance(one, dict) and complete <= one.keys()]

    def run(self, seed: int, branch: str) -> RunFolder:
        """Return the folder of one run, whether it exists or not.

        Raises:
            InvalidInput: a negative seed, or a name that cannot be a folder's.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise invalid("seed", seed, "an integer >= 0")
        return RunFolder(self.path / f"seed-{seed}" / durable.check_name("branch", branch))

    def runs(self) -> list[RunFolder]:
        """Return the runs there are, by seed, the trunk before its branches."""
        found = [
            RunFolder(file.parent)
            for file in self.path.glob("seed-*/*/run.toml")
            if _SEED.fullmatch(file.parent.parent.name)
        ]
        return sorted(found, key=lambda run: (run.seed, run.branch != TRUNK, run.branch))

    def missing_run_tables(self) -> list[Path]:
        """The `run.toml` that folders with metrics do not have: `runs` does not see these."""
        files = [metrics.parent / "run.toml" for metrics in self.path.glob("seed-*/*/metrics")]
        return sorted(
            file for file in files if _SEED.fullmatch(file.parent.parent.name) and not file.exists()
        )


def find_studies(root: Path | str = "runs") -> list[StudyFolder]:
    """Return the studies below `root` by name; none if there is no such folder.

    Those that are not to be opened are left out, see `unopened_studies`.
    """
    unopened = unopened_studies(root)
    return [study for study in _named_studies(root) if study.name not in unopened]


def unopened_studies(root: Path | str = "runs") -> dict[str, str]:
    """Return why studies below `root` are not opened, by name: links in or out of them."""
    found: dict[str, str] = {}
    for study in _named_studies(root):
        if leads_outside(study.path, Path(root)):
            found[study.name] = f"{study.path}: is a link out of {root}; give its own path"
        elif foreign := foreign_entries(study.path):
            found[study.name] = describe_foreign(foreign[0])
    return found


def _named_studies(root: Path | str) -> list[StudyFolder]:
    return [StudyFolder(file.parent) for file in sorted(Path(root).glob("*/spec.toml"))]


def list_runs(root: Path | str = "runs") -> list[RunFolder]:
    """Return all runs of all studies below `root`."""
    return [run for study in find_studies(root) for run in study.runs()]


def open_study(study: StudyFolder | Path | str, root: Path | str = "runs") -> StudyFolder:
    """Return a study by its folder, its name below `root`, or the beginning of its name.

    Raises:
        InvalidInput: there is none, or the beginning fits several.
        IntegrityError: it holds a link, or something else that is neither file nor folder.
    """
    if isinstance(study, StudyFolder):
        return study
    found = find_study(study, root)
    refuse_foreign_entries(found.path)
    return found


def find_study(study: Path | str, root: Path | str = "runs") -> StudyFolder:
    """Return a study as `open_study` does, without a look at what it holds."""
    for path in (Path(study), Path(root) / study):
        if (found := StudyFolder(path)).exists:
            return found
    known = _named_studies(root)
    fitting = [found for found in known if found.name.startswith(os.fspath(study))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(found.name for found in fitting)
        raise invalid("study", os.fspath(study), f"one of {names}", "write more of its name")
    if not known:
        raise invalid("study", os.fspath(study), f"a study's folder; there is none in {root}")
    raise unknown_name("study", os.fspath(study), [found.name for found in known])


def _is_verdict(value: Any) -> bool:
    """Whether it has what is read of a verdict: the claim, the outcome, and maybe a label."""
    return isinstance(value, dict) and all(
        isinstance(value.get(key, default), str)
        for key, default in (("claim", None), ("outcome", None), ("label", ""))
    )


def _read_text(path: Path) -> str:
    try:
        text = read_bytes(path, "spec_bytes", error=IntegrityError).decode("utf-8")
        return text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: damaged, byte {error.start} is not UTF-8") from None
    except FileNotFoundError:
        raise invalid("folder", str(path.parent), f"one that holds {path.name}") from None


class _FollowedFolder(RunFolder):
    """See `RunFolder.followed`: what would be written is not."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def write_status(self, status: Status) -> None:
        pass

    def log(self, message: str) -> None:
        pass
