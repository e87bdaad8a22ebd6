"""Is a product that of the first derivatives? Compared once, before an operator's first product.

A few kernels of torch, and custom functions whose backward pass cannot be differentiated, have a
right gradient and a wrong second derivative, without an error. So one product, over four samples
and near theta, is compared with central differences of gradients (or of whatever the operator is
made of), in a float64 copy of the model where there can be one. `differences.py` says how kinks and
rounding are told from a fault. What a forward pass takes out of the graph (`detach`, `no_grad`) is
held, see `held_constants.py`. A disagreement has to show twice, along two directions.

Not seen: a fault elsewhere than near theta, or with other samples only; what lies below a
thousandth of a parameter's part of the product (in float32, 5 hundredths); and any fault where
kinks and float32 together leave no step at which a difference says something.

The price is a product and two gradients over four samples; with kinks or a fault, up to ten.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.loss.copies import few_of
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.guards.determinism import refuse_changing
from thalweg.loss.guards.differences import Comparison, compare, random_like, scales
from thalweg.loss.guards.failures import said
from thalweg.loss.guards.generators import generators_kept
from thalweg.loss.guards.held_constants import HeldConstants
from thalweg.loss.guards.layer_search import LayerFault, first_faulty_layer
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss, value_of
from thalweg.loss.reduce import several_processes
from thalweg.loss.weighted_sum import WeightedSum
from thalweg.sharding import ShardedVector

# Off theta by this much: zeros (biases, a last layer) hide a fault, and ties are kinks.
NEARBY = 0.01
# How far a copy's loss may be from the model's, relative: else it is another function. The second
# where the forward pass is in lower precision.
SAME, ROUGHLY_SAME = 1e-3, 5e-2

WEIGHT_NORM = (
    "the second derivative of torch's weight_norm is wrong; write the weight as"
    " v * (g / v.norm(dim=1, keepdim=True)) in a parametrization of your own, take it away by"
    " torch.nn.utils.parametrize.remove_parametrizations, or use"
    " torch.nn.utils.parametrizations.spectral_norm or orthogonal"
)
CUSTOM = (
    "write its backward pass of operations of torch on saved tensors, so that it can be"
    " differentiated, or the layer without it"
)
OTHER = "write it of other operations of torch"


class Operator(Protocol):
    """What is compared: a `LossOperator`."""

    objective: Loss
    theta: Tensor
    samples: Tensor | None

    @property
    def gradient(self) -> Tensor:
        """The gradient (P,)."""
        ...

    @property
    def is_checked(self) -> bool:
        """Whether products are to be compared at all."""
        ...

    def refuse(self, fault: str) -> None:
        """Raise, with what was found, or take another way to make products from now on."""
        ...

    def over(self, objective: Loss, theta: Tensor, samples: Tensor | None) -> Self:
        """The same operator of another loss."""
        ...

    def by_differences(
        self, vector: Tensor, step: float, begin: Callable[[], object]
    ) -> Tensor | None:
        """A product by first derivatives alone; None where there is no such way.

        Args:
            begin: to be called before each evaluation of the loss.
        """
        ...

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product."""
        ...


def check_once(operator: Operator) -> bool:
    """Refuse an operator whose products are not those of the first derivatives.

    Compared at the first call for each class of operators of a loss; later ones repeat the outcome.
    A loss with `check = False` is not compared; nor, where several processes run, is one of a class
    of the user's own: its sums may be those of all, and one process that fails in a comparison
    would go on to the next sum while the others wait in this one.

    Returns:
        Whether products are made in another way from now on.

    Raises:
        InvalidInput: they are not; it names the layer, where there is one, and the parameter (of
            the Hessian of a loss with `product="auto"` only where differences are no way). Or a
            loss that is no `Objective` changes from call to call.
    """
    loss = operator.objective
    # A loss without attributes of its own has no place for the outcome.
    known = getattr(loss, "__dict__", None)
    if known is None or not getattr(loss, "check", True) or not _sums_alone(loss):
        return False
    if isinstance(loss, WeightedSum):
        # Term by term: each in a copy of its own, and named by its own layers.
        parts = loss.parts(operator.theta, operator.samples)
        terms = [operator.over(term.loss, theta, samples) for term, theta, samples in parts]
        changed = [check_once(term) for term in terms]
        return any(changed)
    if not operator.is_checked:
        return False
    outcomes = known.setdefault("_products_checked", {})
    if not isinstance(loss, Objective) and "value" not in outcomes:
        # An `Objective` does it before its first value.
        evaluate = functools.partial(value_of, _unchecked(loss), operator.theta, _few(operator))
        refuse_changing(lambda: float(evaluate()), loss.device, rough=False)
        outcomes["value"] = ""
    name = type(operator).__name__
    if name not in outcomes:
        outcomes[name] = ""  # products inside of the comparison are not compared
        try:
            outcomes[name] = compared(operator)[1]
        except BaseException:
            # Not known, so that all processes look again together.
            del outcomes[name]
            raise
    if outcomes[name]:
        operator.refuse(outcomes[name])
    return bool(outcomes[name])


def compared(operator: Operator) -> tuple[Comparison, str]:
    """What a comparison says, and the message of the error that it calls for, or ""."""
    shared, fault = operator.objective, None
    operator = _in_one_piece(operator)
    loss = operator.objective
    with generators_kept(loss.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, fault = _compared(operator)
        except Exception as error:  # whatever stands in the way of a comparison is no fault
            found = Comparison(None, note=said(error))
    message = _message(operator, found, fault) if found.agrees is False else ""
    if isinstance(shared, Objective):
        # All processes go the same way.
        told = shared.reduction.gathered(message)
        message = message or next((text for text in told if text), "")
    return found, message


def _in_one_piece(operator: Operator) -> Operator:
    """The operator itself; of a model in shards that of this process alone, on whole vectors."""
    theta = operator.theta
    if not isinstance(theta, ShardedVector):
        return operator
    assert isinstance(operator.objective, Objective)
    alone = operator.objective.unchecked()
    return operator.over(alone, theta.whole(), _few(operator))


def _compared(operator: Operator) -> tuple[Comparison, LayerFault | None]:
    """Compare; where that finds a fault, again with constants held, and look for the layer."""
    loss = operator.objective
    samples = _few(operator)
    found = Comparison(None)
    for dtype in dict.fromkeys((torch.float64, loss.dtype)):
        try:
            other = _unchecked(loss)
            if dtype != loss.dtype:
                other = _copied(loss, dtype)
                require_same(loss, other, operator.theta, samples)
            found = _along(operator.over(other, near(loss, operator.theta, dtype), samples), 0)
        except Exception as error:
            found = Comparison(None, dtype=dtype, note=said(error))
            continue
        if found.agrees is False:
            return _confirmed(operator, samples, found)
        if found.agrees:
            break
    return found, None


def _confirmed(
    operator: Operator, samples: Tensor, found: Comparison
) -> tuple[Comparison, LayerFault | None]:
    """Compare along another direction, with constants held, in a copy where there can be one."""
    loss, held = operator.objective, HeldConstants()
    assert found.dtype is not None
    theta = near(loss, operator.theta, found.dtype)
    if not isinstance(loss, (Objective, FunctionLoss)):
        return _along(operator.over(loss, theta, samples), 1), None
    other = loss.copied(found.dtype, held.around)
    again = _along(operator.over(other, theta, samples), 1, held)
    if again.agrees is not False:
        return again, None
    if not held.aligned:
        return Comparison(None, note="constants of the forward pass cannot be held"), None
    if not isinstance(other, Objective):
        return again, None
    other.write(theta)
    held.record()
    evaluate = functools.partial(other.value, samples=samples)
    return again, first_faulty_layer(other.model, evaluate, other.evaluator.settings)


def _along(operator: Operator, seed: int, held: HeldConstants | None = None) -> Comparison:
    """Compare one product along a random direction with differences."""
    sizes = [parameter.numel() for parameter in operator.objective.parameters()]
    vector = scales(operator.theta, sizes) * random_like(operator.theta, seed)
    begin: Callable[[], object] = (lambda: None) if held is None else held.replay
    product = operator @ vector

    def difference(step: float) -> Tensor:
        found = operator.by_differences(vector, step, begin)
        if found is None:
            raise InvalidInput("there is no way by first derivatives")
        return found

    return compare(product, operator.gradient, difference, sizes)


def _sums_alone(loss: Loss) -> bool:
    """Whether the loss without checks is summed in this process alone."""
    return isinstance(loss, (Objective, FunctionLoss)) or not several_processes()


def _unchecked(loss: Loss) -> Loss:
    """The same loss without checks; one of the user's own as it is."""
    return loss.unchecked() if isinstance(loss, (Objective, FunctionLoss)) else loss


def _copied(loss: Loss, dtype: torch.dtype) -> Loss:
    if isinstance(loss, (Objective, FunctionLoss)):
        return loss.copied(dtype)
    raise InvalidInput(f"{type(loss).__name__} cannot be copied")


def _few(operator: Operator) -> Tensor:
    """The indices of a few of the operator's samples; of this process's, where there are many."""
    loss, samples = operator.objective, operator.samples
    if isinstance(loss, Objective) and len(loss.samples) != loss.num_samples:
        return few_of(len(loss.samples))
    if samples is None:
        return few_of(loss.num_samples)
    return samples[few_of(len(samples)).to(samples.device)]


def near(loss: Loss, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """A point (P,) near theta where nothing is zero or tied by chance."""
    theta = theta.detach().to(dtype)
    sizes = [parameter.numel() for parameter in loss.parameters()]
    return theta + NEARBY * scales(theta, sizes) * random_like(theta, 3)


def require_same(loss: Loss, other: Loss, theta: Tensor, samples: Tensor) -> None:
    """Raise where a copy is another function, such as one that holds tensors of the model.

    Raises:
        InvalidInput: it is.
    """
    original = float(value_of(_unchecked(loss), theta, samples))
    value = float(value_of(other, theta.to(other.dtype), samples))
    lowered = isinstance(loss, Objective) and loss.evaluator.forward_dtype is not None
    allowed = (ROUGHLY_SAME if lowered else SAME) * max(1.0, abs(original))
    if not abs(value - original) <= allowed:
        raise InvalidInput("a copy of the model in float64 has another loss")


def _message(operator: Operator, found: Comparison, fault: LayerFault | None) -> str:
    loss, name = operator.objective, type(operator).__name__
    layout = getattr(loss, "layout", None)
    parameter = repr(layout.names[found.parameter]) if layout else f"number {found.parameter}"
    functions = () if fault is None else fault.functions
    hint = WEIGHT_NORM if "weight_norm" in functions else CUSTOM if functions else OTHER
    where = "the second derivative is wrong" if fault is None else f"{fault} is at fault"
    return (
        f"{name}: a product is not that of differences of gradients, off by {found.worst:.1%} in"
        f" parameter {parameter}: {where}, though the first derivative may be right; {hint}; or"
        " pass check=False to take products as they are"
    )
