"""Random numbers of torch that are the same for every entry of a tensor, for one comparison.

Whether a loss is a mean over samples is seen from the losses of some and of parts of them, which is
possible only if a sample has the same random numbers in both. Which entry of a random tensor is for
which sample nobody knows. So all entries get one number: dropout keeps everything, and what is
drawn from a distribution is one draw for all.

Example:
    >>> with ConstantDraws(torch.device("cpu")):
    ...     drawn = torch.randn(3)
    >>> bool((drawn == drawn[0]).all())
    True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from thalweg.loss.guards.generators import begun_at

# Of numbers alone, the same for all entries.
UNIFORM = frozenset(
    (
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "randint",
        "randint_like",
        "uniform_",
        "normal_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "cauchy_",
        "random_",
    )
)


class ConstantDraws(TorchDispatchMode):
    """While it is entered, all entries of a random tensor are one number, at each call another.

    Args:
        device: where they are drawn.

    Raises:
        NotImplementedError: a random operation of which no such number is known.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._calls = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self._calls += 1
        name = func.overloadpacket.__name__
        if name in UNIFORM or not any(isinstance(arg, Tensor) for arg in args):
            return self._one_for_all(lambda: func(*args, **kwargs))
        if name in KNOWN:
            return KNOWN[name](*args)
        raise NotImplementedError(f"random numbers of {func}")

    def _one_for_all(self, draw: Callable[[], Tensor]) -> Tensor:
        # Begun anew, or the first number would depend on how many were drawn before.
        with begun_at(self._device, self._calls):
            drawn = draw()
        return drawn.fill_(drawn.flatten()[0]) if drawn.numel() else drawn


def _normal(mean: Any, std: Any = 1.0, *_: Any) -> Tensor:
    return mean + std / 2


def _bernoulli(probability: Tensor, *_: Any) -> Tensor:
    return (probability >= 0.5).to(probability.dtype)


def _native_dropout(values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.clone(), torch.ones_like(values, dtype=torch.bool)


KNOWN: dict[str, Callable[..., Any]] = {
    "normal": _normal,
    "bernoulli": _bernoulli,
    "bernoulli_": lambda values, *_: values.fill_(1),
    "native_dropout": _native_dropout,
}
