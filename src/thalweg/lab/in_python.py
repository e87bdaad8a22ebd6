"""How is a study written in Python, with a model, a loss and data of one's own?

    from thalweg import lab

    study = lab.Study(
        problem=lab.Problem(model=net, loss=loss, train=(inputs, targets)),
        phases=[lab.Phase(torch.optim.SGD, lr=0.1, steps=200)],
        branches={"sgd": lab.Branch(), "bulk": lab.Split(0, 1)},
    )
    result = lab.run(study)

Each class says the same as a table of a TOML spec, under the same names (see `thalweg.lab.config`);
what is not given is left to the spec's defaults, and in a branch to the phase that it starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from thalweg.errors import InvalidInput, invalid
from thalweg.lab.config import Spec, parse_spec
from thalweg.lab.config.layering import laid_over
from thalweg.lab.config.optimizers import GivenOptimizer
from thalweg.problems.given import NAME, GivenData, GivenProblem, source_of, table_of
from thalweg.problems.problem import Problem
from thalweg.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from thalweg.lab.config.optimizers import OptimizerSettings

    Optimizers = (
        str | Mapping[str, Any] | OptimizerSettings | type[Optimizer] | Callable[..., Optimizer]
    )
    """A name ("sgd"), its table, its settings; or a class or function of the parameters."""

USUAL_PROBES = {"loss": 5, "sharpness": 5, "alignment_gradient": 5, "alignment_update": 5}
"""What a study measures that does not say it, each every n steps."""


@dataclass(frozen=True)
class Split:
    """Factors on the dominant and the bulk part of each update: `Split(0, 1)` is Bulk-X.

    Attributes:
        dominant, bulk: the factors, at the start where there is an end.
        dominant_end, bulk_end: the factors at the last step, reached on a line.
        basis: S_k of each step, or that of the branch point.
        metric: in which S_k and the split are; "optimizer" for that of Adam or RMSprop.
        source: a cheap dominant space in place of S_k, as a table.
    """

    dominant: float = 1.0
    bulk: float = 1.0
    dominant_end: float | None = None
    bulk_end: float | None = None
    basis: Literal["live", "frozen"] | None = None
    metric: Literal["euclidean", "optimizer"] | None = None
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Phase:
    """One optimizer, batch size and split, until an end.

    Attributes:
        optimizer: its name ("sgd"), a class of `torch.optim`, or a function that builds one from
            the list of the parameters, such as `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        steps, epochs: the most steps, or passes over the data.
        lr: the learning rate; default: that of the optimizer.
        batch_size: samples in a mini-batch, or "all"; default: 50.
        schedule: change of the learning rate, such as "cosine".
        warmup_steps: steps over which the learning rate rises to its value.
        split: factors on the two parts of each update; none for the bare optimizer.
        clip_norm: greatest norm of the gradient.
        noise: noise of mini-batches that is added, as a table.
        local: workers that are averaged now and then, as a table.
        until_alignment, alignment_ema: end when the moving average of the alignment reaches this.
        until_loss: end when the full training loss is at or below this.
        name: label of the phase.
    """

    optimizer: Optimizers | None = None
    steps: int | None = None
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | Literal["all"] | None = None
    schedule: str | Mapping[str, Any] | None = None
    warmup_steps: int | None = None
    split: Split | Mapping[str, Any] | Literal["off"] | None = None
    clip_norm: float | Literal["off"] | None = None
    noise: Mapping[str, Any] | Literal["off"] | None = None
    local: Mapping[str, Any] | Literal["off"] | None = None
    until_alignment: float | None = None
    alignment_ema: float | None = None
    until_loss: float | None = None
    name: str | None = None


@dataclass(frozen=True)
class Branch(Phase):
    """What a branch does otherwise than the phase that it starts from; "off" leaves a thing out.

    Attributes:
        starts_from: the branch at whose end it starts; the trunk if not given.
        subspace: its own dominant subspace, as a table.
        probes: what it measures otherwise, each every n steps or "off".
    """

    starts_from: str | None = None
    subspace: Mapping[str, Any] | None = None
    probes: Mapping[str, int | Literal["off"]] | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study: one problem, a trunk of phases, and the branches that start at its end.

    Attributes:
        problem: of Python objects; or the name of a data set's table, as in a TOML spec.
        phases: the trunk, one phase after the other.
        branches: what starts from the trunk's end, by name; a split alone is a branch, too.
        probes: what is measured, each every n steps; default: loss, alignment and sharpness.
        k: dimension of the dominant subspace; default: the number of classes.
        seeds: one run of trunk and branches for each.
        claims: statements that are tested in the end.
        figures: what is drawn in the end; default: all that can be.
        name: part of the folder's name.
        description: what the study is for.
        settings: any other key of a spec, such as `{"threads": 2, "subspace": {"error": 0.1}}`.
    """

    problem: GivenProblem | Problem | Mapping[str, Any]
    phases: Sequence[Phase]
    branches: Mapping[str, Branch | Split] = field(default_factory=dict)
    probes: Mapping[str, int] | None = None
    k: int | Literal["classes", "gap"] | None = None
    seeds: Sequence[int] = (0,)
    claims: Sequence[str | Mapping[str, Any]] = ()
    figures: Sequence[str] | None = None
    name: str = "study"
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def spec(self, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Spec:
        """The study as a spec, with its Python objects attached.

        Args:
            overrides: values by key path, or words of the command line.

        Raises:
            InvalidInput: one line for each mistake.
        """
        objects = _as_given(self.problem)
        first = None if objects is None else objects.built(0)
        optimizers = _GivenOptimizers(None if first is None else list(first.model.parameters()))
        raw: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "seeds": list(self.seeds),
            "claims": list(self.claims),
            "probes": dict(USUAL_PROBES if self.probes is None else self.probes),
            "problem": self.problem,
            "phases": [_table(phase, optimizers) for phase in self.phases],
            "branches": {name: _table(one, optimizers) for name, one in self.branches.items()},
        }
        if objects is not None and first is not None:
            raw["problem"] = table_of(objects, first)
            raw["dtype"] = _dtype(first.model)
        if self.k is not None:
            raw["subspace"] = {"k": self.k}
        if self.figures is not None:
            raw["figures"] = list(self.figures)
        tables = laid_over(raw, self.settings)
        spec = parse_spec(tables, source=f"study {self.name}", overrides=overrides)
        if objects is not None and isinstance(spec.problem.data, GivenData):
            spec.problem.data.attach(objects)
        for phase in (*spec.phases, *spec.branches.values()):
            if isinstance(phase.optimizer, GivenOptimizer):
                phase.optimizer.attach(optimizers.by_source[phase.optimizer.source])
        return spec


class _GivenOptimizers:
    """The functions that build optimizers, each under a line that tells it from the others."""

    def __init__(self, parameters: list[Any] | None) -> None:
        self._parameters = parameters
        self.by_source: dict[str, Callable[..., Optimizer]] = {}

    def table(self, made_by: Callable[..., Optimizer], lr: float | None) -> dict[str, Any]:
        """What a spec says of one.

        Raises:
            InvalidInput: it cannot be called with a list of parameters, or has no learning rate.
        """
        bare = _without_rate(made_by)
        source = self._source(bare)
        known = self.by_source.setdefault(source, bare)
        rate = made_by.keywords.get("lr") if isinstance(made_by, partial) else None
        if lr is None:
            lr = self._rate(made_by, source) if rate is None else rate
        if known is bare and (isinstance(bare, type) or rate is not None):
            self.by_source[source] = partial(bare, lr=lr)
        return {"name": NAME, "source": source, "lr": lr}

    def _source(self, made_by: Callable[..., Optimizer]) -> str:
        source = first = source_of(made_by)
        number = 1
        while source in self.by_source and not _is_same(self.by_source[source], made_by):
            number += 1  # two functions of one line of code
            source = f"{first} ({number})"
        return source

    def _rate(self, made_by: Callable[..., Optimizer], source: str) -> float:
        import torch

        dummy = [torch.zeros(2, 2, requires_grad=True)]
        parameters = dummy if self._parameters is None else self._parameters
        try:
            return float(made_by(parameters).param_groups[0]["lr"])
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            hint = "give a function of the list of parameters that returns an optimizer"
            raise InvalidInput(f"optimizer {source}: {reason}; {hint}") from error


def _without_rate(made_by: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Without its learning rate, which the spec has: the rest is one kind of optimizer."""
    if not (isinstance(made_by, partial) and "lr" in made_by.keywords):
        return made_by
    others = {key: value for key, value in made_by.keywords.items() if key != "lr"}
    return (
        partial(made_by.func, *made_by.args, **others) if others or made_by.args else made_by.func
    )


def _is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    one, other = _without_rate(one), _without_rate(other)
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other


def _table(words: Phase | Split, optimizers: _GivenOptimizers) -> dict[str, Any]:
    """The table of a phase or branch, with what was given; a split alone is a branch."""
    if isinstance(words, Split):
        words = Branch(split=words)
    table = _given_words(words)
    rate = table.pop("lr", None)
    optimizer: Any = table.get("optimizer")
    if isinstance(words.split, Split):
        table["split"] = _given_words(words.split)
    if isinstance(optimizer, str):
        table["optimizer"] = {"name": optimizer}
    if callable(optimizer):
        made_by: Any = optimizer
        table["optimizer"] = optimizers.table(made_by, rate)
    elif rate is not None:
        table["optimizer"] = {**_plain(table.get("optimizer", {})), "lr": rate}
    return table


def _plain(optimizer: Any) -> dict[str, Any]:
    """The table of an optimizer's settings."""
    if isinstance(optimizer, Mapping):
        return dict(optimizer)
    if isinstance(optimizer, Settings):
        return {"name": optimizer.registered_name, **optimizer.model_dump(exclude_none=True)}
    allowed = "a name, a table, or a class or function of the parameters"
    raise invalid("optimizer", type(optimizer).__name__, allowed)


def _given_words(words: Phase | Split) -> dict[str, Any]:
    values = {field.name: getattr(words, field.name) for field in fields(words)}
    return {name: value for name, value in values.items() if value is not None}


def _as_given(problem: GivenProblem | Problem | Mapping[str, Any]) -> GivenProblem | None:
    """The Python objects of a problem; None where it is a table."""
    if isinstance(problem, Problem):
        names = [field.name for field in fields(GivenProblem)]
        return GivenProblem(**{name: getattr(problem, name) for name in names})
    if isinstance(problem, Mapping | GivenProblem):
        return None if isinstance(problem, Mapping) else problem
    raise invalid("problem", type(problem).__name__, "a lab.Problem, or the table of a spec")


def _dtype(model: nn.Module) -> str:
    """The dtype of a study: that of the parameters where it is double, else single."""
    import torch

    return "float64" if any(p.dtype == torch.float64 for p in model.parameters()) else "float32"
