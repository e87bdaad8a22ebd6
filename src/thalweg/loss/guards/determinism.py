"""Is the loss a function of theta alone? What makes it random or chunk-dependent is refused.

A Hessian of a loss that changes from call to call is the Hessian of nothing. Known layers are named
with a hint; whatever else draws random numbers is noticed by the generators' states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput
from thalweg.loss.guards.generators import States, generators_kept

BY_BATCHES = "give data as a list of batches with mode='train', each batch then a sample of its own"
BATCH_NORM = (
    f"pass mode='eval' to evaluate with running statistics, call model.eval(), or {BY_BATCHES}"
)
WITHOUT_STATISTICS = f"build it with track_running_stats=True, take nn.GroupNorm, or {BY_BATCHES}"
DROPOUT = (
    "pass mode='eval' to evaluate with dropout off, call model.eval(), or pass seed= to fix what is"
    " drawn"
)

Layer = tuple[str, nn.Module, str]
"""A layer's name, the layer, and what it does to the loss."""


def mode_dependent_layers(model: nn.Module) -> list[Layer]:
    """Layers with which the loss is not a function of theta alone in training mode, and why."""
    found: list[Layer] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append((name, module, "makes the loss random"))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found.append((name, module, "makes the loss depend on which samples share a batch"))
    return found


def refuse_unfit_layers(
    layers: list[Layer], in_training: Callable[[nn.Module], bool], *, drawn: bool, whole: bool
) -> None:
    """Raise for the first layer that is in no state to be differentiated, with a hint.

    Args:
        in_training: whether a layer will be evaluated in training mode.
        drawn: random numbers are fixed by a seed.
        whole: batches are evaluated as they were given, each a sample.

    Raises:
        InvalidInput: dropout in training mode whose draw is not fixed; batch norm in training mode,
            or without running statistics, where batches are cut.
    """
    for name, module, reason in layers:
        normed = isinstance(module, nn.modules.batchnorm._BatchNorm)
        always = normed and module.running_mean is None
        if (whole if normed else drawn) or not (always or in_training(module)):
            continue
        where = "without running statistics" if always else "in training mode"
        hint = WITHOUT_STATISTICS if always else BATCH_NORM if normed else DROPOUT
        kind = type(module).__name__
        raise InvalidInput(f"layer {name or 'model'!r} ({kind}) {where} {reason}; {hint}")


@contextmanager
def no_random_numbers(device: torch.device) -> Iterator[None]:
    """Refuse a loss that draws random numbers, whichever layer or function drew them."""
    states = _random_states(device)
    yield
    if all(map(torch.equal, states, _random_states(device))):
        return
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    raise InvalidInput(
        "the loss draws random numbers (dropout inside attention or by function, sampling?); pass"
        " seed= to fix what is drawn, or mode='eval' where dropout is the reason"
    )


# Where a generator is seen to be used: so many values must be the same. One that is used at one
# call in five shows in 14 of them with a probability of 0.96.
LOOKS = 14
# What may differ where sums are made in any order (on a GPU), relative; with 8 bits or 11.
SAME, ROUGHLY_SAME = 1e-5, 1e-2


def refuse_changing(evaluate: Callable[[], float], device: torch.device, rough: bool) -> bool:
    """Raise where a value changes from call to call, whatever the source of chance or memory.

    Two calls, or `LOOKS` where a generator of Python or NumPy has been used meanwhile. Generators
    are put back.

    Args:
        evaluate: the loss of a few samples, at one point.
        device: whose generator it may use.
        rough: whether it computes in lower precision than float32.

    Returns:
        Whether it draws random numbers, to no effect on the value.

    Raises:
        InvalidInput: it changes.
    """
    relative = ROUGHLY_SAME if rough else SAME

    def apart() -> tuple[float, float]:
        """The value that is furthest from the first, and by how much more than is allowed."""
        other = max(values, key=lambda value: abs(value - values[0]))
        return other, abs(other - values[0]) - relative * max(abs(values[0]), abs(other))

    with generators_kept(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states, values, drawn = States(device), list[float](), ""
        try:
            while len(values) < 2 or (drawn and len(values) < LOOKS and apart()[1] <= 0):
                values.append(evaluate())
                drawn = " and ".join(states.moved())
        except Exception:  # it will be told where the loss is evaluated as it was asked for
            return False
    first, (other, beyond) = values[0], apart()
    # At most the allowed; NaN is none of this check's business.
    if beyond > 0:
        source = f"random numbers of {drawn}" if drawn else "memory of former calls, or chance"
        shared = "of the generators of torch, NumPy or Python, and pass seed="
        mend = "pass seed= to fix what is drawn" if drawn else f"draw random numbers {shared}"
        raise InvalidInput(
            f"the loss changes from call to call: {first:.6g}, then {other:.6g} for the same"
            f" samples and parameters ({source}); curvature needs a fixed loss: {mend}, pass"
            " mode='eval', or draw the numbers once, outside of model and loss"
        )
    return bool(drawn)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
