"""How does a plain function or class become a data set, model or loss that a spec can name?

Its parameters are the settings, with their types and defaults:

    >>> from thalweg.registry import register, models
    >>> @register.model("two-layers")
    ... def two_layers(inputs: int, outputs: int, width: int = 64):
    ...     from torch import nn
    ...     return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))
    >>> models.find("two-layers")(width=8)
    two_layers(width=8)
    >>> del models["two-layers"]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape, Samples
from thalweg.settings import Settings, registered, with_signature_of

if TYPE_CHECKING:
    from torch import nn


class PlainSettings(Settings):
    """The parameters of a plain function or class."""

    made_by: ClassVar[Callable[..., Any]]

    def options(self) -> dict[str, Any]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class PlainModel(PlainSettings):
    """A model built from `inputs`, the numbers in one input, and `outputs`, where it asks."""

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        """The model."""
        given = {"inputs": inputs.size, "outputs": outputs}
        asked = inspect.signature(type(self).made_by).parameters
        known = {name: value for name, value in given.items() if name in asked}
        return type(self).made_by(**known, **self.options())


class PlainData(PlainSettings):
    """A data set of the inputs and targets that a function returns, held-out ones after them."""

    def build(self) -> Samples:
        """The samples; integer targets are classes.

        Raises:
            InvalidInput: it returns neither samples nor two or four arrays.
        """
        made = type(self).made_by(**self.options())
        if isinstance(made, Samples):
            return made
        if not (isinstance(made, tuple) and len(made) in (2, 4)):
            what = f"{len(made)} values" if isinstance(made, tuple) else f"a {type(made).__name__}"
            raise InvalidInput(
                f"data set {self.registered_name}: its function returned {what}; return (inputs,"
                " targets), or (inputs, targets, held-out inputs, held-out targets)"
            )
        inputs, targets, *test = map(np.asarray, made)
        classes = int(targets.max()) + 1 if np.issubdtype(targets.dtype, np.integer) else None
        held_out = test or (None, None)
        return Samples(inputs, targets, classes, test_inputs=held_out[0], test_labels=held_out[1])


class PlainLoss(PlainSettings):
    """A loss: a function of output and target, or a class of such functions."""

    target: ClassVar[str] = "class"

    def build(self) -> Callable[..., Any]:
        """The function of output and target."""
        if isinstance(type(self).made_by, type):
            return type(self).made_by(**self.options())
        return partial(type(self).made_by, **self.options())


def data_settings(kind: str, name: str, given: object) -> type[Settings]:
    """The settings of a data set: of a class of settings, or of a function that returns tensors."""
    return _settings(kind, name, given, PlainData, ())


def model_settings(kind: str, name: str, given: object) -> type[Settings]:
    """The settings of a model: of a class of settings, a module's class or a function."""
    return _settings(kind, name, given, PlainModel, ("inputs", "outputs"))


def loss_settings(
    kind: str, name: str, given: object, *, target: Literal["class", "one-hot"] | None = None
) -> type[Settings]:
    """The settings of a loss: of a class of settings, a function, or a module's class.

    Args:
        target: what a plain loss understands where the data have classes; default: "class".
    """
    first: tuple[str, ...] = ()
    if callable(given) and not isinstance(given, type):
        first = tuple(inspect.signature(given).parameters)[:2]
    found = _settings(kind, name, given, PlainLoss, first)
    if target is not None:
        found.target = target  # type: ignore[attr-defined]
    return found


def _settings(
    kind: str, name: str, given: object, base: type[PlainSettings], known: tuple[str, ...]
) -> type[Settings]:
    if not callable(given) or (isinstance(given, type) and issubclass(given, Settings)):
        return registered(kind, name, given)
    made = with_signature_of(given, base, known, f"{kind} {name!r}")
    made.made_by = staticmethod(given)  # type: ignore[assignment]
    return registered(kind, name, made)
