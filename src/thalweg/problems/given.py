"""How do a model, a loss and data that are Python objects become a problem of a spec?

A spec is text and cannot hold them. It holds what tells them apart instead, a fingerprint of data
and initial parameters and the words of the loss, and the objects are attached to it where they are
at hand. Without them the spec is still read, its measurements are loaded and judged; it cannot be
trained.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from thalweg.errors import InvalidInput, invalid
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.problem import Loss, Problem, own_random_state
from thalweg.registry import datasets, losses, models
from thalweg.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    Pair = tuple[Any, Any] | Dataset[Any]
    """Inputs and targets, or a data set of such pairs."""
    Model = nn.Module | Callable[..., nn.Module]
    """A module, or a function that builds one from a seed."""

NAME = "given"
HINT = "they were Python objects; call thalweg.lab.run with the same ones"


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenProblem:
    """A problem of Python objects, for `thalweg.lab.run`.

    Attributes:
        model: a module, from whose parameters every seed starts; or a function that builds one,
            from the seed if it takes an argument. It is copied: training leaves it as it is.
        loss: (output, target) -> scalar, the mean over samples.
        train: inputs (n, ...) and targets (n, ...), tensors or arrays; or a `Dataset` of pairs.
        test: the held-out ones, None when there are none.
        num_classes: how many classes there are; default: as many as integer targets say, none for
            other targets.
    """

    model: Model
    loss: Loss
    train: Pair
    test: Pair | None = None
    num_classes: int | None = None

    def built(self, seed: int) -> Problem:
        """The problem of a seed, its model and samples as they were given.

        Raises:
            InvalidInput: no module, or inputs and targets that are not as many.
        """
        train = _tensors(self.train, "train")
        test = None if self.test is None else _tensors(self.test, "test")
        classes = _number_of_classes(train[1]) if self.num_classes is None else self.num_classes
        with own_random_state(seed):
            model = _module(self.model, seed)
        shape = InputShape(tuple(train[0].shape[1:]))
        return Problem(
            model=model.train(),
            loss=self.loss,
            train=train,
            test=test,
            num_classes=classes,
            input_shape=shape,
        )


@datasets.register(NAME)
class GivenData(Settings):
    """Samples that are Python objects, with the model and the loss that are trained on them."""

    listed: ClassVar[bool] = False

    samples: int
    fingerprint: str
    _objects: GivenProblem | None = PrivateAttr(default=None)

    def attach(self, objects: GivenProblem) -> None:
        """Give what the fingerprint stands for."""
        self._objects = objects

    def build(self) -> Any:
        """Refuse: model and loss come with the data, see `problem`."""
        raise InvalidInput(f"data {NAME}: it comes with its model and loss; {HINT}")

    def problem(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> Problem:
        """The problem of a seed.

        Raises:
            InvalidInput: the objects are not at hand.
        """
        if self._objects is None:
            raise InvalidInput(f"problem: its model, loss and data are not here; {HINT}")
        built = self._objects.built(seed)
        move = partial(_moved, dtype=dtype, device=device)
        return replace(
            built,
            model=built.model.to(device=device, dtype=dtype),
            train=(move(built.train[0]), move(built.train[1])),
            test=built.test and (move(built.test[0]), move(built.test[1])),
        )


@models.register(NAME)
class GivenModel(Settings):
    """A model that is a Python object."""

    listed: ClassVar[bool] = False

    source: str
    fingerprint: str

    def build(self, inputs: InputShape, outputs: int) -> Any:
        """Refuse: it comes with its data."""
        raise InvalidInput(f"model {NAME}: it comes with its data; {HINT}")


@losses.register(NAME)
class GivenLoss(Settings):
    """A loss that is a Python object."""

    listed: ClassVar[bool] = False

    source: str

    def build(self) -> Any:
        """Refuse: it comes with its data."""
        raise InvalidInput(f"loss {NAME}: it comes with its data; {HINT}")


def table_of(objects: GivenProblem, problem: Problem) -> dict[str, Any]:
    """What a spec says of a problem of Python objects: the table `[problem]`.

    What a function refers to is not looked into.

    Args:
        problem: built from the objects for seed 0.
    """
    parameters = problem.model.state_dict()
    return {
        "data": {
            "name": NAME,
            "samples": problem.num_samples,
            "fingerprint": problem.fingerprint(),
        },
        "model": {
            "name": NAME,
            "source": source_of(objects.model),
            "fingerprint": _fingerprint(parameters),
        },
        "loss": {"name": NAME, "source": source_of(objects.loss)},
    }


def source_of(made_by: Any) -> str:
    """A line that tells an object from others: its name, and a hash of its code where that is seen.

    Example:
        >>> source_of(partial(int, base=2))
        'builtins.int(base=2)'
    """
    if isinstance(made_by, partial):
        words = [repr(value) for value in made_by.args]
        words += [f"{key}={value!r}" for key, value in sorted(made_by.keywords.items())]
        return f"{source_of(made_by.func)}({', '.join(words)})"
    if not (inspect.isroutine(made_by) or isinstance(made_by, type)):
        words = " ".join(repr(made_by).split())
        return words if _says_itself(made_by) else source_of(type(made_by))
    module = made_by.__module__ or "__main__"
    name = f"{module}.{made_by.__qualname__}"
    if module.partition(".")[0] in ("torch", "builtins"):
        return name
    try:
        code = inspect.getsource(made_by)
    except (OSError, TypeError):  # typed into an interpreter
        return name
    return f"{name} {hashlib.sha256(code.encode()).hexdigest()[:8]}"


def _says_itself(thing: object) -> bool:
    """Whether the words for an object are the same in the next process: without an address."""
    return type(thing).__repr__ is not object.__repr__ and " at 0x" not in repr(thing)


def _module(model: Any, seed: int) -> nn.Module:
    """The module itself, copied, or what the function builds."""
    from torch import nn

    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    made: Any = model
    if callable(model):
        made = model(seed) if _takes_a_seed(model) else model()
    if not isinstance(made, nn.Module):
        raise invalid(
            "model", type(made).__name__, "a torch.nn.Module, or a function that builds one"
        )
    return made


def _takes_a_seed(function: Callable[..., Any]) -> bool:
    """Whether there is a parameter that must be given, or one called seed."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    of_position = [p for p in parameters if p.kind in kinds]
    return any(p.default is p.empty or p.name == "seed" for p in of_position[:1])


def _tensors(given: Any, where: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors."""
    import torch
    from torch.utils.data import Dataset

    if isinstance(given, Dataset):
        pairs = [given[number] for number in range(len(given))]  # type: ignore[arg-type]
        inputs = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
        targets = torch.stack([torch.as_tensor(pair[1]) for pair in pairs])
    elif isinstance(given, tuple | list) and len(given) == 2:
        inputs, targets = (torch.as_tensor(part) for part in given)
    else:
        raise invalid(where, type(given).__name__, "(inputs, targets), or a torch Dataset of pairs")
    if len(inputs) != len(targets) or len(inputs) == 0:
        counts = f"{len(inputs)} inputs and {len(targets)} targets"
        raise invalid(where, counts, "as many of both, at least one")
    return inputs, targets


def _number_of_classes(targets: Tensor) -> int | None:
    whole = not (targets.is_floating_point() or targets.is_complex())
    return int(targets.max()) + 1 if whole else None


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """On the device, numbers in the study's dtype; integers stay what they are."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        digest.update(content.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
