"""What torch and Python raise inside of a model or a loss, in words that help: where, and the mend.

A message of torch names an operation of its own, and comes from deep inside of a product. Here the
layer is named: in the forward pass by the frames of the traceback, in a derivative by trying each
layer on a few samples, in a copy of the model. That happens after a failure alone, and costs
nothing before. The error as it was raised is the cause of the one that is told.

Left as they are: errors of classes of the user's own or of other libraries, warnings that were
turned into errors, errors of files and imports, memory that does not suffice, and whatever is
raised outside of model and loss, such as by a data set.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = torch.randn(8, 3), torch.randn(8, 2)
    >>> try:
    ...     Objective(torch.nn.Linear(4, 2), torch.nn.MSELoss(), data).value()
    ... except ValueError as error:
    ...     print(str(error).partition(": ")[0], "|", str(error).partition("; ")[2][:35])
    the model (Linear) fails in the forward pass | it was given float32 (8, 3); inputs
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.errors import DifferentiableOnce, InvalidInput, ThalwegError
from thalweg.loss.guards.generators import generators_kept
from thalweg.loss.guards.graph import BY_GRADIENTS
from thalweg.loss.guards.layer_search import LayerFault, first_faulty_layer
from thalweg.loss.guards.memory import is_out_of_memory

MOST_LETTERS = 200
UNTOLD = (ThalwegError, Warning, OSError, ImportError, MemoryError)
EVALUATION = "thalweg.loss.evaluation"

# In what torch says of an operation without a derivative, its name.
UNDIFFERENTIATED = re.compile(
    r"derivative for '?(?:aten::)?_?(\w+?)(?:_backward)?(?:: \w+)?'? is not implemented"
)
# What does the same, or nearly, and can be differentiated twice.
INSTEAD = {
    "hardsigmoid": "nn.functional.relu6(x + 3) / 6 is the same, nn.Sigmoid is smooth",
    "cdist": "(x.unsqueeze(-2) - y.unsqueeze(-3)).norm(dim=-1) is the same",
    "pdist": "(x[i] - x[j]).norm(dim=1) with i, j = torch.triu_indices(n, n, 1) is the same",
    "segment_reduce": "sums by torch.index_add, divided by the lengths, are the same",
    "multi_margin_loss": (
        "write (margin - output.gather(1, target[:, None]) + output).relu() with the target's own"
        " entry left out"
    ),
    "ctc_loss": "write the sum over alignments by torch.logsumexp, step by step",
}
KERNEL = "leave the kernel of attention to Thalweg: take torch.nn.attention.sdpa_kernel away"
OTHERWISE = (
    "write it of operations that can be differentiated twice, or take another layer, such as"
    " nn.Sigmoid for nn.Hardsigmoid"
)
# What helps, by what is said of a derivative.
OF_DERIVATIVES = (
    (r"inplace operation", "write it out of place: y = 2 * x for x.mul_(2)"),
    (r"backward through the graph a second time", "detach() what the model keeps between calls"),
    (r"aot_autograd|torch\.compile", "give the function as it is before it is compiled"),
    (r"_flash_attention|_efficient_attention|fused_attention", KERNEL),
    (r"either the backward or vjp", "write its backward pass, of operations of torch"),
)
# The same of the forward pass: of the model, and of the loss.
OF_THE_MODEL = (
    (r"positional argument|keyword argument", "a batch is (inputs..., target): forward gets each"
     " of the inputs, and a dict batch by keyword"),
    (r"shapes? cannot be multiplied|size of tensor|size mismatch|[Ee]xpected.*(channels|dim)",
     "inputs have to be of the shape that the layer was built for"),
    (r"indices.*scalar types", "give integers: inputs.long()"),
    (r"index out of range|out of bounds", "indices have to be below the size that the layer was"
     " built for (num_embeddings)"),
    (r"dtype|scalar type", "give data and model in one dtype: inputs.to(weight.dtype)"),
    (r"same device|different devices", "move all to one device"),
)  # fmt: skip
OF_THE_LOSS = (
    (r"positional argument|keyword argument", "it is called as loss(output, target), and as"
     " loss(output, batch) where batches are dicts"),
    (r"out of bounds|Assertion.*cur_target", "classes are numbered from 0: the model needs an"
     " output for each, and ignore_index marks those that do not count"),
    (r"[Ss]ize|shape", "output and target have to fit one another: output.squeeze(1),"
     " target.unsqueeze(1), or another loss"),
    (r"dtype|scalar type", "classes are integers, target.long(), and all else floating-point,"
     " target.to(output.dtype)"),
)  # fmt: skip


class Failing(Protocol):
    """What fails: an `Objective`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def evaluator(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    def first_kink(self) -> str: ...


def explained(
    error: Exception, objective: Failing, alone: Callable[[bool], tuple[Any, Tensor]]
) -> InvalidInput | None:
    """What to raise for an error that came out of an evaluation; None to let it pass.

    Args:
        error: as it was raised, with its traceback.
        objective: that was evaluated.
        alone: gives a loss to try layers in and a few samples: a copy where asked for.
    """
    if not is_foreign(error):
        return None
    inside = [f for f in _frames(error) if _is(f, EVALUATION, "forward")]
    if inside:
        return InvalidInput(_of_forward(error, objective, inside[-1]))
    if any(f.f_globals.get("__name__", "").startswith("torch.autograd") for f in _frames(error)):
        return _of_derivative(error, objective, alone)
    return None


def is_foreign(error: BaseException) -> bool:
    """Whether an error is one of torch's or of Python's own, and not one of `UNTOLD`."""
    if isinstance(error, UNTOLD) or not isinstance(error, Exception):
        return False
    of_theirs = type(error).__module__.partition(".")[0] in ("builtins", "torch")
    return of_theirs and not is_out_of_memory(error)


@contextmanager
def of_function(function: object, what: str, help_with: str) -> Iterator[None]:
    """Tell what fails in a plain function, or in a derivative of it.

    Args:
        what: that is computed.
        help_with: the mend where nothing better is known.

    Raises:
        InvalidInput: in place of what torch and Python raise.
    """
    try:
        yield
    except Exception as error:
        if not is_foreign(error):
            raise
        name = getattr(function, "__name__", type(function).__name__)
        mend = _mend_of_derivative(error, help_with)
        kind = DifferentiableOnce if "derivative" in what else InvalidInput
        raise kind(f"function {name!r}: {what} fails: {said(error)}; {mend}") from error


def said(error: BaseException) -> str:
    """The class and the message of an error on one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a message that cannot be made
        text = ""
    text = text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _of_forward(error: Exception, objective: Failing, frame: FrameType) -> str:
    """The message for an error in the forward pass, or in a loss.

    Args:
        frame: in which model and loss are called.
    """
    names = {id(module): name for name, module in objective.model.named_modules()}
    layers = [f for f in _frames(error) if id(f.f_locals.get("self")) in names]
    if layers:
        module = layers[-1].f_locals["self"]
        where = LayerFault(names[id(module)], type(module).__name__, ())
        given = next((_kinds(f) for f in reversed(layers) if "args" in f.f_locals), "")
        last = "model(inputs) must work for each batch of the data as it is given"
        mend = _mend(str(error), OF_THE_MODEL, last)
        given = f"it was given {given}; " if given else ""
        return f"{where} fails in the forward pass: {said(error)}; {given}{mend}"
    local = frame.f_locals
    pairs = [(name, local.get(name)) for name in ("output", "target")]
    given = ", ".join(f"{name} {_kind(v)}" for name, v in pairs if isinstance(v, Tensor))
    mend = _mend(str(error), OF_THE_LOSS, "loss(model(inputs), target) must work for each batch")
    given = f"it was given {given}; " if given else ""
    return f"loss {_name(objective.evaluator.loss)} fails: {said(error)}; {given}{mend}"


def _of_derivative(
    error: Exception, objective: Failing, alone: Callable[[bool], tuple[Any, Tensor]]
) -> InvalidInput:
    """What to raise for an error in a first or second derivative."""
    where = f"the model ({type(objective.model).__name__}) or its loss"
    with generators_kept(objective.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied, samples = _to_try(alone)
        once = _has_gradient(copied, samples)
        fault = _faulty(copied, samples)
        if fault is not None:
            where = str(fault)
        elif _loss_fails(copied, samples):
            where = f"loss {_name(objective.evaluator.loss)}"
    mend = _mend_of_derivative(error, OTHERWISE)
    if not once:
        return InvalidInput(f"{where} has no derivative: {said(error)}; {mend}")
    otherwise = "" if _has_kinks(objective) else f"; or {BY_GRADIENTS}"
    return DifferentiableOnce(f"{where} has no second derivative: {said(error)}; {mend}{otherwise}")


def _mend_of_derivative(error: Exception, otherwise: str) -> str:
    operation = UNDIFFERENTIATED.search(str(error))
    mend = _mend(str(error), OF_DERIVATIVES, otherwise)
    return mend if operation is None else INSTEAD.get(operation[1], mend)


def _to_try(alone: Callable[[bool], tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
    try:
        return alone(True)
    except Exception:  # whatever a model raises that cannot be copied
        return alone(False)


def _has_gradient(loss: Any, samples: Tensor) -> bool:
    try:
        loss.value_and_gradient(samples=samples)
    except Exception:
        return False
    return True


def _has_kinks(objective: Failing) -> bool:
    try:
        return bool(objective.first_kink())
    except Exception:  # that cannot be said of what fails
        return True


def _faulty(loss: Any, samples: Tensor) -> LayerFault | None:
    try:
        return first_faulty_layer(
            loss.model,
            lambda: loss.value(samples=samples),
            loss.evaluator.settings,
            raising_alone=True,
        )
    except Exception:  # a model without hooks, such as one of TorchScript
        return None


def _loss_fails(loss: Any, samples: Tensor) -> bool:
    """Whether the loss alone, as a function of the outputs, cannot be differentiated twice."""
    try:
        evaluation = next(loss.evaluations(samples=samples))
    except Exception:
        return False
    outputs = evaluation.outputs
    with evaluation.at:
        try:
            slopes = torch.autograd.grad(
                evaluation.loss, outputs, create_graph=True, allow_unused=True
            )
            slopes = [s for s in slopes if s is not None and s.requires_grad]
            ones = [torch.ones_like(s) for s in slopes]
            if slopes:
                torch.autograd.grad(slopes, outputs, ones, allow_unused=True)
        except Exception:
            return True
    return False


def _mend(text: str, table: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((mend for pattern, mend in table if re.search(pattern, text)), otherwise)


def _name(loss: object) -> str:
    """Of a loss, as users know it."""
    if loss is None:
        return "of the model"
    return repr(getattr(loss, "__name__", type(loss).__name__))


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _is(frame: FrameType, module: str, function: str) -> bool:
    return frame.f_code.co_name == function and frame.f_globals.get("__name__") == module


def _kinds(frame: FrameType) -> str:
    """What a layer was called with, by its frame."""
    given = tree_leaves((frame.f_locals.get("args"), frame.f_locals.get("kwargs")))
    return ", ".join(_kind(leaf) for leaf in given if isinstance(leaf, Tensor))


def _kind(tensor: Tensor) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.is_floating_point() or not tensor.numel() or tensor.device.type == "meta":
        return kind
    try:
        return f"{kind} from {int(tensor.min())} to {int(tensor.max())}"
    except Exception:  # under a transform, or where a GPU has failed
        return kind
