"""The checks of a diagnosis: each looks at one thing of a loss, and says what it found.

A check gives what it found, a verdict, and a hint. What it raises is "not checked".
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from thalweg.errors import InvalidInput, ThalwegError
from thalweg.loss.chunk_multiplier import EVERY_SIZE, ChunkMultiplier
from thalweg.loss.copies import few_of
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.guards.determinism import (
    ROUGHLY_SAME,
    SAME,
    mode_dependent_layers,
    refuse_changing,
)
from thalweg.loss.guards.differences import Comparison, compare, random_like, scales
from thalweg.loss.guards.dtypes import is_low, widest
from thalweg.loss.guards.failures import said
from thalweg.loss.guards.held_constants import HeldConstants
from thalweg.loss.guards.sparse import layers_with_sparse_gradients
from thalweg.loss.guards.wrapped import unwrapped
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss, value_of
from thalweg.loss.weighting import Counted
from thalweg.measure.plain_evaluation import Plain, named_parameters, plain_evaluation
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.product_check import compared, near, require_same
from thalweg.tracking.wrapping import held_by

Verdict = Literal["right", "wrong", "not checked"]
RIGHT: Verdict = "right"
WRONG: Verdict = "wrong"
UNKNOWN: Verdict = "not checked"

EVALUATIONS = 3
GROUPS = 24
"""The most parts of theta along which the loss is moved."""
VECTORS = 4
RITZ_VALUES = 16
ELSEWHERE = 0.5
"""How far the other point is, on the scale of each parameter."""
ROUGH = 5e-2
"""What a lower precision may change, relative."""
# Of a parameter whose gradient is below this part of the whole, rounding is not told from a fault.
SMALL = 1e-2


class Answer(NamedTuple):
    """What a check found, in a few words; its verdict; what helps."""

    found: str
    verdict: Verdict
    hint: str = ""


class Subject:
    """What is looked at: a loss, at its parameters as they are, on a few samples.

    Args:
        loss: any; most is known of an `Objective`.
        optimizer: that trains its parameters, if any.
        most: the most samples.

    Attributes:
        few: the indices of the samples, int64 (n,); of this process's, where there are many.
        found_weight: what the loss turned out to average over.
        known: the verdicts so far, by check.
    """

    def __init__(self, loss: Loss, optimizer: Optimizer | None, most: int) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.theta = loss.theta()
        own = len(loss.samples) if isinstance(loss, Objective) else loss.num_samples
        self.few = few_of(own, most)
        self.found_weight: Any = None
        self.known: dict[str, Verdict] = {}
        self._plain: Plain | None = None

    @property
    def objective(self) -> Objective:
        """The loss, where it is an `Objective`."""
        assert isinstance(self.loss, Objective)
        return self.loss

    def alone(self) -> Any:
        """The same loss without checks, of this process alone, multiplied vector by vector."""
        if isinstance(self.loss, FunctionLoss):
            return self.loss.unchecked()
        if not isinstance(self.loss, Objective):
            other: Any = copy.copy(self.loss)
            other.check = False
            return other
        other = self.loss.unchecked(tells=True)
        other.multiplier = ChunkMultiplier(0)
        other.batch_weight = self.found_weight or other.batch_weight
        return other

    def plain(self) -> Plain:
        """The loss by torch alone, at the parameters."""
        if self._plain is None:
            self._plain = plain_evaluation(self.alone(), self.theta, self.few)
        return self._plain

    def operator(self, kind: type[LossOperator]) -> LossOperator:
        """A curvature of the loss over the few samples."""
        return kind(self.alone(), self.theta, self.few)

    def vector(self, seed: int) -> Tensor:
        """A random direction (P,), on the scale of each parameter."""
        sizes = [parameter.numel() for parameter in self.loss.parameters()]
        return scales(self.theta, sizes) * random_like(self.theta, seed)

    def block(self, count: int) -> Tensor:
        """Random directions (P, count)."""
        return torch.stack([self.vector(seed) for seed in range(count)], 1)

    def name(self, number: int) -> str:
        """Of a parameter."""
        layout = getattr(self.loss, "layout", None)
        return repr(layout.names[number]) if layout else f"number {number}"

    @property
    def tolerance(self) -> float:
        """How far two ways to the same numbers may be apart, relative."""
        rough = isinstance(self.loss, Objective) and (
            self.loss.is_rough or is_low(self.loss.model.parameters())
        )
        return ROUGH if rough else torch.finfo(self.theta.dtype).eps ** 0.5

    def same(self, first: Tensor, second: Tensor, hint: str) -> Answer:
        """Whether two vectors (P,) are the same, parameter by parameter."""
        sizes = [parameter.numel() for parameter in self.loss.parameters()]
        first, second = (vector.detach().to(self.theta.dtype) for vector in (first, second))
        floor = SMALL * max(float(first.norm()), float(second.norm()))
        pairs = zip(first.split(sizes), second.split(sizes), strict=True)
        apart = [
            float((a - b).norm()) / (max(float(a.norm()), float(b.norm()), floor) or 1.0)
            for a, b in pairs
        ]
        worst = max(range(len(apart)), key=apart.__getitem__)
        if apart[worst] <= self.tolerance:
            return Answer(f"the same, to {apart[worst]:.1e}", RIGHT)
        return Answer(f"{apart[worst]:.1e} apart in {self.name(worst)}", WRONG, hint)


def told(error: BaseException) -> str:
    """An error on one line."""
    return str(error) if isinstance(error, ThalwegError) else said(error)


def devices(subject: Subject) -> Answer:
    objective = subject.objective
    batch, _ = next(iter(objective.samples.chunks(subject.few[:1], 1)))
    model = {str(p.device) for p in objective.model.parameters()}
    data = {str(leaf.device) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if model == data and len(model) == 1:
        return Answer(f"model and data on {', '.join(model)}", RIGHT)
    found = f"model on {', '.join(sorted(model))}, data on {', '.join(sorted(data))}"
    return Answer(found, WRONG, "move all to one device, and build the Objective after that")


def dtypes(subject: Subject) -> Answer:
    model = subject.objective.model
    parameters = subject.objective.parameters()
    counts = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    found = ", ".join(f"{count} in {name}" for name, count in counts.items())
    found = f"parameters: {found}; theta: {str(subject.theta.dtype).removeprefix('torch.')}"
    low = is_low(model.parameters())
    if low != subject.objective.evaluator.is_low or subject.theta.dtype != widest(
        p.dtype for p in parameters
    ):
        return Answer(found, WRONG, "the dtype was changed later: build the Objective again")
    return Answer(f"{found}; evaluated in float32" if low else found, RIGHT)


def wrappers(subject: Subject) -> Answer:
    objective = subject.objective
    found = [f"{objective.wrapper} around the model"] if objective.wrapper else []
    found += [
        f"{type(module).__name__} around {name!r}"
        for name, module in objective.model.named_modules()
        if unwrapped(module) is not module
    ]
    return Answer(f"taken off: {', '.join(found)}" if found else "none", RIGHT)


def parameters(subject: Subject) -> Answer:
    objective = subject.objective
    held = dict(named_parameters(objective))
    ids = set(map(id, held.values()))
    named = list(objective.model.named_parameters())
    parts = {
        "frozen": [name for name, p in named if not p.requires_grad and id(p) not in ids],
        "left out": [name for name, p in named if p.requires_grad and id(p) not in ids],
    }
    found = f"{len(held)} in theta"
    if subject.optimizer is not None:
        trained = held_by(subject.optimizer)
        parts["not in the optimizer"] = [n for n, p in held.items() if id(p) not in trained]
        if len(parts["not in the optimizer"]) == len(held):
            return Answer(
                f"{found}, none in the optimizer", WRONG, "build both of one model's parameters"
            )
    for what, names in parts.items():
        if names:
            found += f"; {what}: {_some(names)}"
    return Answer(found, RIGHT)


def modes(subject: Subject) -> Answer:
    objective = subject.objective
    layers = mode_dependent_layers(objective.model)
    mode = objective.evaluator.mode
    found = _some([f"{name} ({type(module).__name__})" for name, module, _ in layers])
    found = f"{found}; mode={mode!r}" if layers else "none"
    try:
        objective.evaluator.refuse_unfit_mode()
    except InvalidInput as error:
        return Answer(found, WRONG, str(error))
    return Answer(found, RIGHT)


def sparse(subject: Subject) -> Answer:
    objective = subject.objective
    with_sparse = [layer for layer in layers_with_sparse_gradients(objective.model) if layer.sparse]
    names = [n for n, module in objective.model.named_modules() if module in with_sparse]
    return Answer(f"made dense: {_some(names)}" if names else "none", RIGHT)


def value(subject: Subject) -> Answer:
    try:
        found = value_of(subject.alone(), subject.theta, subject.few)
    except Exception as error:
        return Answer("it cannot be evaluated", WRONG, told(error))
    return Answer(f"{float(found):.6g}", RIGHT)


def repeatable(subject: Subject) -> Answer:
    loss, rough = subject.alone(), subject.tolerance == ROUGH

    def evaluate() -> float:
        return float(value_of(loss, subject.theta, subject.few))

    try:
        refuse_changing(evaluate, loss.device, rough)
    except InvalidInput as error:
        return Answer("it changes", WRONG, str(error))
    values = [evaluate() for _ in range(EVALUATIONS)]
    apart = (max(values) - min(values)) / (max(map(abs, values)) or 1.0)
    verdict = RIGHT if apart <= (ROUGHLY_SAME if rough else SAME) else WRONG
    return Answer(f"{EVALUATIONS} evaluations, {apart:.1e} apart", verdict)


def mean(subject: Subject) -> Answer:
    alone = subject.alone()
    vars(alone).update(check=True, _mean=None, _repeatable=True)
    fits, found = alone.is_mean(), alone._mean
    if found is None:
        return Answer("", UNKNOWN, "each batch is one sample, and never cut")
    if not found.samples:
        return Answer("", UNKNOWN, found.note)
    if not fits:
        try:
            alone.require_mean()
        except InvalidInput as error:
            what = "ambiguous" if found.ambiguous else f"off by {found.apart:.2%}"
            return Answer(what, WRONG, str(error))
    subject.found_weight = weight = alone.batch_weight
    what = "samples" if weight is None else "what batch_weight counts"
    what = str(weight) if isinstance(weight, Counted) else what
    return Answer(f"of {found.samples} samples in two parts, over {what}", RIGHT)


def chunks(subject: Subject) -> Answer:
    whole, parts = subject.alone(), subject.alone()
    if whole.evaluator.seed is not None:
        return Answer("", UNKNOWN, "the draw of a seed is another one for another chunk_size")
    whole.chunk_size, parts.chunk_size = None, -(-len(subject.few) // 3)
    first, second = (loss.gradient(subject.theta, subject.few) for loss in (whole, parts))
    return subject.same(first, second, "see 'mean over samples'; evaluate all in one chunk")


def against_torch(subject: Subject) -> Answer:
    hint = "the model at its own parameters is another function; does it keep tensors of its own?"
    return _against_torch(subject, subject.theta, subject.plain(), hint)


def elsewhere(subject: Subject) -> Answer:
    if is_low(subject.objective.model.parameters()):
        raise InvalidInput("parameters in bfloat16 or float16 cannot hold another point")
    point = subject.theta + ELSEWHERE * subject.vector(4)
    plain = plain_evaluation(subject.alone(), point, subject.few)
    hint = "something in the model does not follow its parameters (a cached weight, a checkpoint?)"
    return _against_torch(subject, point, plain, hint)


def _against_torch(subject: Subject, theta: Tensor, plain: Plain, hint: str) -> Answer:
    pairs = zip(subject.loss.parameters(), plain.gradients, strict=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    theirs = torch.cat([part.reshape(-1).to(subject.theta.dtype) for part in parts])
    return subject.same(subject.alone().gradient(theta, subject.few), theirs, hint)


def gradient(subject: Subject) -> Answer:
    """The gradient along parts of theta against central differences of the loss."""
    found, held = Comparison(None), HeldConstants()
    for dtype in dict.fromkeys((torch.float64, subject.theta.dtype)):
        try:
            loss = _copied(subject, dtype, held)
            found = _loss_moved(subject, loss, dtype, held)
        except Exception as error:
            found = Comparison(None, dtype=dtype, note=told(error))
        if found.agrees is not None:
            break
    if held.found and not held.aligned:
        return Answer("", UNKNOWN, "constants of the forward pass cannot be held")
    hint = "a backward pass that is not that of its forward pass (rounding, a custom function?)"
    return _answer(found, lambda part: f"part {part} of theta", hint, held.found, subject)


def _copied(subject: Subject, dtype: torch.dtype, held: HeldConstants) -> Any:
    loss = subject.loss
    try:
        if not isinstance(loss, (Objective, FunctionLoss)):
            raise InvalidInput(f"{type(loss).__name__} cannot be copied")
        other = loss.copied(dtype, held.around)
        require_same(loss, other, subject.theta, subject.few)
    except Exception:
        if dtype != loss.dtype:
            raise
        return subject.alone()
    if isinstance(other, Objective):
        other.batch_weight = subject.found_weight or other.batch_weight
    return other


def _loss_moved(subject: Subject, loss: Any, dtype: torch.dtype, held: HeldConstants) -> Comparison:
    theta = near(subject.loss, subject.theta, dtype)
    vectors = [part.to(dtype) for part in _along_parts(subject)]
    held.record()
    at, slope = loss.value_and_gradient(theta, subject.few)

    def moved(step: float, vector: Tensor) -> float:
        held.replay()
        return float(value_of(loss, theta + step * vector, subject.few))

    def difference(step: float) -> Tensor:
        ends = [(moved(step, vector) - moved(-step, vector)) / (2 * step) for vector in vectors]
        return torch.tensor(ends, dtype=dtype, device=theta.device)

    slopes = torch.stack([slope @ vector for vector in vectors])
    count = len(vectors)
    return compare(slopes, at.to(dtype).expand(count), difference, [1] * count)


def _along_parts(subject: Subject) -> list[Tensor]:
    """A random direction cut into parts of theta, a parameter each or a few: each (P,)."""
    sizes = [parameter.numel() for parameter in subject.loss.parameters()]
    at_once = -(-len(sizes) // GROUPS)
    whole, parts, begin = subject.vector(5), [], 0
    for first in range(0, len(sizes), at_once):
        end = begin + sum(sizes[first : first + at_once])
        part = torch.zeros_like(whole)
        part[begin:end] = whole[begin:end]
        parts.append(part)
        begin = end
    return parts


def _answer(
    found: Comparison, name: Callable[[int], str], hint: str, held: bool, subject: Subject
) -> Answer:
    """What a comparison with differences says."""
    if found.agrees is None:
        return Answer("", UNKNOWN, found.note)
    dtype = str(found.dtype).removeprefix("torch.")
    if len(subject.loss.parameters()) <= GROUPS:
        name = subject.name
    if not found.agrees:
        return Answer(f"off by {found.worst:.1%} in {name(found.parameter)} ({dtype})", WRONG, hint)
    constants = "; detached values held" if held else ""
    off = f"off by at most {found.worst:.1e}" if found.worst else "the same, up to rounding"
    return Answer(f"{off} ({dtype}){constants}", RIGHT)


def products(kind: type[LossOperator]) -> Callable[[Subject], Answer]:
    """The check of an operator's products against those of first derivatives."""

    def check(subject: Subject) -> Answer:
        operator = subject.operator(kind)
        try:
            _ = operator @ subject.vector(0)
        except Exception as error:
            # What only the Hessian can do is no fault of the others.
            refused = isinstance(error, InvalidInput) and error.__cause__ is None
            verdict = UNKNOWN if refused and kind is not Hessian else WRONG
            return Answer("no product", verdict, told(error))
        found, message = compared(operator)
        return _answer(found, subject.name, message, False, subject)

    return check


def symmetry(subject: Subject) -> Answer:
    operator = subject.operator(Hessian)
    u, v = subject.vector(0), subject.vector(1)
    first, second = operator @ v, operator @ u
    largest = max(float(u.norm() * first.norm()), float(v.norm() * second.norm())) or 1.0
    apart = abs(float(u @ first - v @ second)) / largest
    found = f"u^T H v and v^T H u {apart:.1e} apart"
    hint = "its second derivative is none: see 'Hessian against differences'"
    return Answer(found, RIGHT) if apart <= subject.tolerance else Answer(found, WRONG, hint)


def definite(subject: Subject) -> Answer:
    """Gauss-Newton's Ritz values: not negative, where the loss is convex in the outputs."""
    count = min(RITZ_VALUES, subject.loss.num_parameters)
    basis = torch.linalg.qr(subject.block(count)).Q
    middle = basis.T @ (subject.operator(GaussNewton) @ basis)
    ritz = torch.linalg.eigvalsh((middle + middle.T) / 2)
    low, high = float(ritz[0]), float(ritz[-1])
    found = f"{count} Ritz values from {low:.1e} to {high:.1e}"
    if low >= -subject.tolerance * max(abs(low), abs(high)):
        return Answer(found, RIGHT)
    if subject.known.get(GAUSS_NEWTON) == RIGHT:
        return Answer(f"{found}: the loss is not convex in the outputs", RIGHT)
    return Answer(found, WRONG, "the loss is not convex in the outputs, or its derivatives wrong")


def vectorized(subject: Subject) -> Answer:
    one_by_one, at_once = subject.alone(), subject.alone()
    at_once.multiplier = ChunkMultiplier(EVERY_SIZE)
    block = subject.block(VECTORS)
    expected = Hessian(one_by_one, subject.theta, subject.few) @ block
    try:
        found = Hessian(at_once, subject.theta, subject.few) @ block
    except InvalidInput:
        return Answer("no vectorized pass: vectors are multiplied one by one", RIGHT)
    hint = "a layer is wrong under torch.vmap: pass vectorize_up_to=0"
    answers = [subject.same(a, b, hint) for a, b in zip(found.T, expected.T, strict=True)]
    return next((answer for answer in answers if answer.verdict == WRONG), answers[0])


def writes(subject: Subject) -> Answer:
    names = subject.plain().inputs
    found = f"into the batch's {_some(names)}: it is given copies" if names else "none"
    return Answer(found, RIGHT)


def buffers(subject: Subject) -> Answer:
    names = subject.plain().buffers
    return Answer(f"changed, and put back: {_some(names)}" if names else "unchanged", RIGHT)


def unused(subject: Subject) -> Answer:
    parts = zip(subject.objective.layout.names, subject.plain().gradients, strict=True)
    names = [name for name, part in parts if part is None]
    return Answer(f"their part is zero: {_some(names)}" if names else "none", RIGHT)


def recomputation(subject: Subject) -> Answer:
    batch, _ = next(iter(subject.objective.samples.chunks(subject.few, None)))
    reads = subject.objective.evaluator.reads_again(batch)
    if not reads.any:
        return Answer("none", RIGHT)
    what = "parameters and all" if reads.tensors else "without parameters"
    return Answer(f"backward passes run Python again, {what}", RIGHT)


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first of some names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


VALUE, TWICE, MEAN = "loss", "one batch twice", "mean over samples"
HESSIAN, GAUSS_NEWTON = "Hessian against differences", "GaussNewton against differences"

# Name, check, whether it is of an `Objective` alone, and what has to be right for it.
CHECKS: tuple[tuple[str, Callable[[Subject], Answer], bool, tuple[str, ...]], ...] = (
    ("devices", devices, True, ()),
    ("dtypes", dtypes, True, ()),
    ("wrappers", wrappers, True, ()),
    ("parameters", parameters, True, ()),
    ("layers that depend on the mode", modes, True, ()),
    ("layers with sparse gradients", sparse, True, ()),
    (VALUE, value, False, ()),
    (TWICE, repeatable, False, (VALUE,)),
    (MEAN, mean, True, (VALUE, TWICE)),
    ("chunk sizes", chunks, True, (VALUE, TWICE)),
    ("gradient against torch's", against_torch, True, (VALUE, TWICE)),
    ("gradient at another point", elsewhere, True, (VALUE, TWICE)),
    ("gradient against differences", gradient, False, (VALUE, TWICE)),
    (HESSIAN, products(Hessian), False, (VALUE, TWICE)),
    ("symmetry of the Hessian", symmetry, False, (VALUE, TWICE)),
    (GAUSS_NEWTON, products(GaussNewton), True, (VALUE, TWICE)),
    ("GaussNewton is semidefinite", definite, True, (VALUE, TWICE, GAUSS_NEWTON)),
    (
        "GradientCovariance against gradients",
        products(GradientCovariance),
        True,
        (VALUE, TWICE, MEAN),
    ),
    ("vectorized products", vectorized, True, (VALUE, TWICE)),
    ("writes in place", writes, True, (VALUE,)),
    ("buffers", buffers, True, (VALUE,)),
    ("unused parameters", unused, True, (VALUE,)),
    ("recomputation", recomputation, True, (VALUE,)),
)
