"""Everything that has a name: data sets, models, optimizers, probes, claims, figures, sinks, ...

One `Registry` for each kind, and one way into it: `@register.<kind>("name")`, from a module that
is given as `--plugin`, or from Python. A name that is not registered is refused in one way
everywhere, with the nearest one. The built-in entries of a kind are imported when the registry is
first asked for one.

Example:
    >>> @register.sink("nowhere")
    ... class Nowhere:
    ...     def log(self, row, step): ...
    ...     def close(self): ...
    >>> sinks.find("nowhere") is Nowhere
    True
    >>> sinks.find("nowere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    thalweg.errors.InvalidInput: sink: got 'nowere', allowed: one of ...; did you mean 'nowhere'?
    >>> del sinks["nowhere"]
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from thalweg.errors import InvalidInput, ThalwegError, invalid, unknown_name

NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
"""Letters, digits, '-', '_' and '.', not starting with '.': such a name stays in its folder."""
NAME_WORDS = "letters, digits, '-', '_' and '.', not starting with '.'"

T = TypeVar("T")
E = TypeVar("E")


class Registry(MutableMapping[str, T], Generic[T]):
    """The entries of one kind by name, in the order in which they were added.

    Args:
        kind: what an entry is, in the singular ("claim"), for messages.
        built_in: modules that register the built-in entries; imported at the first look-up.
        fit: `module:function` that makes an entry of what was given, or refuses it:
            `fit(kind, name, given, **options)`; imported when something is registered.
    """

    def __init__(self, kind: str, *built_in: str, fit: str = "") -> None:
        self.kind = kind
        self._fit = fit
        self._built_in = list(built_in)
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: Any, **options: Any) -> T:
        """Register an entry under a name, and return what is registered.

        Raises:
            InvalidInput: the name is malformed or taken, or the entry is not of the kind.
        """
        if not (isinstance(name, str) and re.fullmatch(NAME_PATTERN, name)):
            raise invalid(f"name of a {self.kind}", name, NAME_WORDS)
        if name in self._entries:
            hint = f"it is registered already{_origin(self._entries[name])}; choose another name"
            raise invalid(f"{self.kind} name", name, "a name not used yet", hint)
        if self._fit:
            module, function = self._fit.split(":")
            entry = getattr(importlib.import_module(module), function)(
                self.kind, name, entry, **options
            )
        self._entries[name] = entry
        return entry

    def add_named(self, entry: E) -> E:
        """Register an entry under its own attribute `name`, and return it."""
        self.add(entry.name, entry)  # type: ignore[attr-defined]
        return entry

    def register(self, name: str, **options: Any) -> Callable[[E], E]:
        """Decorator that registers what it decorates under a name, and leaves it as it is."""

        def add(entry: E) -> E:
            self.add(name, entry, **options)
            return entry

        return add

    def find(self, name: str) -> T:
        """The entry of that name.

        Raises:
            InvalidInput: there is none; the message has the nearest name.
        """
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted, without those that nobody is to choose."""
        return tuple(sorted(name for name in self if getattr(self[name], "listed", True)))

    def load_built_in(self) -> None:
        """Import the modules that register the built-in entries, once."""
        while self._built_in:
            importlib.import_module(self._built_in.pop(0))

    def __getitem__(self, name: str) -> T:
        self.load_built_in()
        return self._entries[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        self.load_built_in()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self.load_built_in()
        return iter(list(self._entries))

    def __len__(self) -> int:
        self.load_built_in()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self._entries)})"


_SETTINGS = "thalweg.settings:registered"

datasets: Registry[Any] = Registry(
    "data set", "thalweg.problems", fit="thalweg.problems.plain:data_settings"
)
"""Training and held-out samples with targets."""

models: Registry[Any] = Registry(
    "model", "thalweg.problems", fit="thalweg.problems.plain:model_settings"
)
"""A `torch.nn.Module` for inputs and outputs of the data set's shapes."""

losses: Registry[Any] = Registry(
    "loss", "thalweg.problems", fit="thalweg.problems.plain:loss_settings"
)
"""A mean over samples, from outputs and targets."""

optimizers: Registry[Any] = Registry(
    "optimizer", "thalweg.lab.config.optimizers", fit="thalweg.lab.config.optimizers:fit"
)
"""What makes a step."""

schedules: Registry[Any] = Registry("schedule", "thalweg.lab.config.learning_rates", fit=_SETTINGS)
"""The learning rate along a phase, as a factor."""

probes: Registry[Any] = Registry(
    "probe",
    "thalweg.measure.probes",
    "thalweg.measure.minibatch_noise",
    "thalweg.measure.batch_sharpness",
    "thalweg.measure.critical_sharpness",
    "thalweg.measure.directional_sharpness",
    "thalweg.measure.gradient_noise_scale",
    "thalweg.contrib.block_sharpness",
    "thalweg.measure.curvature_energy",
    "thalweg.measure.curvature_shares",
    "thalweg.measure.stability_probes",
    "thalweg.measure.gap_and_trace",
    "thalweg.measure.sharpness_by_block",
    fit="thalweg.measure.probes:fit",
)
"""What is measured at a step of training."""

claims: Registry[Any] = Registry("claim", "thalweg.analysis.claims")
"""A published statement, the statistic that tests it, the rule that decides."""

figures: Registry[Any] = Registry("figure", "thalweg.analysis.figures")
"""What is drawn of a study."""

panels: Registry[Any] = Registry("panel", "thalweg.analysis.report.panels")
"""What can be looked at in a report."""

studies: Registry[Any] = Registry("study", "thalweg.lab.config.studies")
"""An experiment over any problem."""

sinks: Registry[Any] = Registry(
    "sink",
    "thalweg.measure.sinks",
    "thalweg.integrations.parquet",
    "thalweg.integrations.tensorboard",
    "thalweg.integrations.wandb",
    "thalweg.integrations.trackio",
    "thalweg.integrations.mlflow",
    "thalweg.integrations.notebook",
)
"""Where measured rows go: `log(row, step)` and `close()`."""

executors: Registry[Any] = Registry(
    "executor",
    "thalweg.lab.execution.local",
    "thalweg.lab.execution.inline",
    "thalweg.lab.execution.lockstep",
    "thalweg.lab.execution.slurm",
    "thalweg.lab.execution.ray",
)
"""What runs the tasks of a study: processes of this machine, this process, a cluster's queue."""

conclusions: Registry[Any] = Registry("conclusion", "thalweg.analysis.conclusion")
"""What is made of a study's measurements once its runs have ended: verdicts, figures, a report."""

sweep_conclusions: Registry[Any] = Registry(
    "sweep conclusion", "thalweg.analysis.regimes.conclusion"
)
"""What is made of a sweep's measurements once its runs have ended: pictures, a page."""


class Register:
    """One decorator for each kind of registered thing: `@register.probe("theta_norm")`.

    The built-in entries are registered first, so that none of their names can be taken.
    """

    def __init__(self, **registries: Registry[Any]) -> None:
        self._registries = registries

    def __getattr__(self, kind: str) -> Callable[..., Callable[[E], E]]:
        if kind.startswith("_") or kind not in self._registries:
            raise AttributeError(f"register.{kind}: allowed: {', '.join(self._registries)}")
        registry = self._registries[kind]
        registry.load_built_in()
        return registry.register

    def __dir__(self) -> list[str]:
        return sorted(self._registries)


register = Register(
    data=datasets,
    model=models,
    loss=losses,
    optimizer=optimizers,
    schedule=schedules,
    probe=probes,
    claim=claims,
    figure=figures,
    panel=panels,
    study=studies,
    sink=sinks,
    executor=executors,
    conclusion=conclusions,
    sweep_conclusion=sweep_conclusions,
)


def _origin(entry: object) -> str:
    place = getattr(entry, "__qualname__", "")
    return f" by {getattr(entry, '__module__', '?')}.{place}" if place else ""


def load_plugin(module: str) -> None:
    """Import a user's module (`my_package.problems`) or file (`problems.py`) that registers things.

    Dotted names are also looked for in the current folder. A second call with the same module
    does nothing.

    Raises:
        InvalidInput: no such module, or it fails on import; the message says where and why.
    """
    datasets.load_built_in()  # their names, and those of models and losses, are taken first
    try:
        if module.endswith(".py"):
            _import_file(Path(module))
        else:
            _import_module(module)
    except ThalwegError as error:
        raise InvalidInput(f"plugin {module!r}: {error}") from error
    except Exception as error:
        raise InvalidInput(f"plugin {module!r}: {_reason(error)}") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InvalidInput("no such file; give a .py file or the dotted name of a module")
    name = "thalweg_plugin_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput("not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise


def _import_module(name: str) -> None:
    here = str(Path.cwd())
    sys.path.append(here)  # last, so that nothing installed is shadowed
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _reason(error: Exception) -> str:
    """One line: the exception, and the last line of the user's code it went through."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__} in {error.filename}, line {error.lineno}: {error.msg}"
    place = ""
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if filename not in (__file__, importlib.__file__) and not filename.startswith("<frozen"):
            place = f" (line {step.tb_lineno} of {Path(filename).name})"
        step = step.tb_next
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}{place}"
