"""Is what Thalweg says of a loss right? All that can be tried is tried, and laid out in a table.

The checks that an `Objective` makes by itself, and more, by hand: on a few samples, each with what
was found. The table is made to be pasted into a report of a fault.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> diagnosis = diagnose(Objective(model, torch.nn.MSELoss(), data))
    >>> diagnosis.ok, diagnosis["symmetry of the Hessian"].verdict
    (True, 'right')
"""

from __future__ import annotations

import platform
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from thalweg.errors import invalid
from thalweg.loss.guards.generators import generators_kept
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss
from thalweg.measure.diagnosis_checks import (
    CHECKS,
    RIGHT,
    UNKNOWN,
    WRONG,
    Answer,
    Subject,
    Verdict,
    told,
)
from thalweg.measure.plain_evaluation import Trace
from thalweg.sharding import refuse_sharding
from thalweg.surroundings import shielded
from thalweg.tracking.wrapping import require_optimizer

MOST_LOOKED_AT = 16
WIDTH = 100
LOSS, TRACE = "loss", "left as it was"


@dataclass(frozen=True)
class Finding:
    """One row of a diagnosis.

    Attributes:
        check: what was looked at.
        found: what came out, in a few words or numbers.
        verdict: "right", "wrong", or "not checked".
        hint: what helps, or why it was not checked; empty where there is nothing to say.
        seconds: how long it took.
    """

    check: str
    found: str
    verdict: Verdict
    hint: str
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a loss: rows as data, and a table as text (`str`, `print`).

    Attributes:
        settings: versions, machine, sizes and settings, one line each.
        rows: the findings, in the order in which they were made.

    Example:
        >>> from thalweg.loss.function_loss import FunctionLoss
        >>> diagnosis = diagnose(FunctionLoss(lambda t: (t**4).sum(), torch.ones(2)))
        >>> [row.check for row in diagnosis.rows if row.verdict == "wrong"]
        []
    """

    settings: tuple[str, ...]
    rows: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return all(row.verdict != WRONG for row in self.rows)

    def __getitem__(self, check: str) -> Finding:
        """The row of a check, by its name.

        Raises:
            KeyError: no check of that name was made.
        """
        for row in self.rows:
            if row.check == check:
                return row
        raise KeyError(check)

    def __str__(self) -> str:
        """An aligned table of plain text, hints below their rows."""
        head = ("check", "found", "verdict", "seconds")
        cells = [(row.check, row.found, row.verdict, f"{row.seconds:.3f}") for row in self.rows]
        check = max(len(c[0]) for c in (head, *cells))
        verdict = max(len(c[2]) for c in (head, *cells))
        found = WIDTH - check - verdict - len(head[3]) - 6
        wrapped = (textwrap.wrap(line, WIDTH, subsequent_indent="    ") for line in self.settings)
        lines = [part for parts in wrapped for part in parts] + [""]
        for cell, hint in ((head, ""), *zip(cells, (row.hint for row in self.rows), strict=True)):
            for i, part in enumerate(textwrap.wrap(cell[1], found) or [""]):
                a, b, c = (cell[0], cell[2], cell[3]) if i == 0 else ("", "", "")
                lines.append(f"{a:{check}}  {part:{found}}  {b:{verdict}}  {c:>7}".rstrip())
            lines += textwrap.wrap(
                hint, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
            )
            if cell is head:
                lines.append("  ".join("-" * n for n in (check, found, verdict, 7)))
        return "\n".join(lines)


def diagnose(
    objective: Loss, optimizer: Optimizer | None = None, *, samples: int = MOST_LOOKED_AT
) -> Diagnosis:
    """Try all that can be tried of a loss, on a few samples; whatever is wrong is a row.

    Looked at are, by the loss alone: its value, one batch twice, the gradient against differences
    of the loss, products with the Hessian against differences of gradients (the layer at fault is
    named), their symmetry. Of an `Objective` besides: the mean over samples, chunk sizes, the
    gradient against torch's own of the model's own parameters, here and at another point,
    `GaussNewton` and `GradientCovariance`, vectorized products, in-place writes, buffers, frozen
    and unused parameters, layers that depend on the mode, sparse gradients, recomputation,
    wrappers, dtypes and devices.

    It costs some hundred gradients of the samples looked at. Nothing is changed: parameters,
    gradients, buffers and random generators are as before, which the last row looks at; while it
    runs, the model's own parameters hold other values for moments.

    Args:
        objective: any loss; most is known of an `Objective`.
        optimizer: which of the parameters does it train?
        samples: the most samples to look at.

    Returns:
        The findings; `print` it.

    Raises:
        InvalidInput: an argument that is no loss, no optimizer, or no number of samples.

    Example: see the module.
    """
    if not hasattr(objective, "value_and_gradient") or not hasattr(objective, "linearize"):
        raise invalid("objective", type(objective).__name__, "an Objective, or another loss")
    if optimizer is not None:
        require_optimizer("optimizer", optimizer)
    if samples < 1:
        raise invalid("samples", samples, "an integer >= 1")
    refuse_sharding(objective, "diagnose")
    trace = Trace(objective)
    with shielded(), generators_kept(objective.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(objective, optimizer, samples)
        settings = tuple(_settings(subject))
        rows = list(_rows(subject))
    rows.append(_timed(TRACE, lambda: _left(trace)))
    return Diagnosis(settings, tuple(rows))


def _rows(subject: Subject) -> Iterator[Finding]:
    known, said = subject.known, dict[str, str]()
    for name, check, of_an_objective, needs in CHECKS:
        lacking = next((other for other in needs if known.get(other) == WRONG), None)
        if of_an_objective and not isinstance(subject.loss, Objective):
            continue
        if lacking is not None:
            yield Finding(name, "", UNKNOWN, f"see {lacking!r}", 0.0)
            continue
        row = _timed(name, lambda check=check: check(subject))
        known[name] = row.verdict
        if row.hint in said:
            row = replace(row, hint=f"see {said[row.hint]!r}")
        elif row.hint:
            said[row.hint] = name
        yield row


def _timed(name: str, check: Callable[[], Answer]) -> Finding:
    begin = time.perf_counter()
    try:
        answer = check()
    except Exception as error:  # a fault is a row, whatever it is
        answer = Answer("", UNKNOWN, told(error))
    return Finding(name, *answer, time.perf_counter() - begin)


def _left(trace: Trace) -> Answer:
    changed = trace.changed()
    if not changed:
        return Answer("parameters, gradients, buffers, random generators", RIGHT)
    hint = "the forward pass writes into it in place; take a new tensor, or register a buffer"
    return Answer(f"changed: {', '.join(changed)}", WRONG, hint)


def _settings(subject: Subject) -> Iterator[str]:
    from thalweg import __version__

    loss = subject.loss
    yield (
        f"thalweg {__version__}, torch {torch.__version__}, Python {platform.python_version()},"
        f" {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    )
    sizes = f"P = {loss.num_parameters}, N = {loss.num_samples}, {loss.dtype}, {loss.device}"
    if not isinstance(loss, Objective):
        yield f"{type(loss).__name__}: {sizes}"
    else:
        evaluator = loss.evaluator
        criterion = evaluator.loss
        name = getattr(criterion, "__name__", type(criterion).__name__)
        name = "of the model" if criterion is None else name
        yield f"model {type(loss.model).__name__}, loss {name}: {sizes}"
        weight = "None" if loss.batch_weight is None else "given or found"
        yield (
            f"chunk_size={loss.chunk_size}, mode={evaluator.mode!r},"
            f" forward_dtype={evaluator.forward_dtype}, multiplier={loss.multiplier},"
            f" batch_weight: {weight}, check={loss.check}"
        )
    yield f"{len(subject.few)} samples looked at"
