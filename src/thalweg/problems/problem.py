"""What is trained: a model, a loss, and samples as tensors, from a spec and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from thalweg.errors import InvalidInput, invalid
from thalweg.problems.data.dataset import Encodes, InputShape, Samples, choose
from thalweg.problems.data.preprocess import Scaling, scaling

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from thalweg.problems.problem_spec import ProblemSpec

Loss = Callable[["Tensor", "Tensor"], "Tensor"]
"""(output, target) -> scalar, the mean over samples."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """A training problem, ready to use.

    A user's own is made by calling this class, or from a spec by registering a data set or a model
    (see `thalweg.problems`).

    Attributes:
        model: initialized, on the device, in training mode.
        loss: (output, target) -> scalar, the mean over samples.
        train: inputs (n, ...) and targets (n, ...), which the loss understands.
        test: the held-out inputs and targets, None when there are none.
        num_classes: how many classes there are; None for regression.
        name: for people and folder names.
        input_shape: the shape of one input.
        notes: what a user should know about the data, a sentence each.
    """

    model: nn.Module
    loss: Loss
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    num_classes: int | None = None
    name: str = "given"
    input_shape: InputShape | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """How many training samples there are."""
        return len(self.train[0])

    def labels(self, targets: Tensor) -> Tensor:
        """The class numbers int64 of one-hot targets (..., classes); class numbers stay."""
        return targets.argmax(dim=-1) if targets.is_floating_point() else targets

    def accuracy(self, output: Tensor, targets: Tensor) -> Tensor:
        """The fraction, from 0 to 1, of outputs (..., classes) that are largest at the right class.

        Of a language model that is the fraction of tokens.

        Raises:
            InvalidInput: a problem without classes has no accuracy.
        """
        if self.num_classes is None:
            raise InvalidInput(f"problem {self.name}: no accuracy without classes")
        return (output.argmax(dim=-1) == self.labels(targets)).float().mean()

    def fingerprint(self) -> str:
        """SHA-256 of the samples: shows whether data files have changed between two runs."""
        import torch

        digest = hashlib.sha256()
        for tensor in (*self.train, *(self.test or ())):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            content = tensor.detach().cpu().contiguous().flatten()
            digest.update(content.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@runtime_checkable
class BringsProblem(Protocol):
    """A data set that comes with its model and loss: Python objects, which no spec can build."""

    def problem(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> Problem:
        """The problem of a seed, called with a random state of its own."""
        ...


def build_problem(
    spec: ProblemSpec,
    seed: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Problem:
    """Read the data, choose and scale the samples, initialize the model.

    The model's initial parameters depend on the spec and the seed alone, and are drawn in float32
    on the CPU whatever dtype and device; no random state outside is read or changed.

    Args:
        spec: what `[problem]` says in a spec.
        seed: the run's seed.
        dtype: of parameters, inputs and one-hot targets; float32 if not given.
        device: where model and samples are put.

    Raises:
        InvalidInput: data missing or damaged, too few samples, or parts that do not fit together.
        IntegrityError: a downloaded file is not the published one.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    if isinstance(spec.data, BringsProblem):
        with own_random_state(seed):
            return spec.data.problem(seed, dtype, device)
    samples = _chosen(spec)
    shape = InputShape(tuple(np.shape(samples.train_inputs)[1:]), samples.vocabulary)
    scale = scaling(samples, spec.preprocess)
    kind = getattr(spec.loss, "target", "class")
    outputs = _num_outputs(samples)
    with own_random_state(seed):
        model = spec.model.build(shape, outputs)
    return Problem(
        name=spec.data.registered_name,
        model=model.to(device=device, dtype=dtype),
        loss=spec.loss.build(),
        train=(
            _inputs(samples.train_inputs, samples, scale, dtype, device),
            _targets(samples.train_labels, samples, kind, dtype, device),
        ),
        test=None
        if samples.test_inputs is None or samples.test_labels is None
        else (
            _inputs(samples.test_inputs, samples, scale, dtype, device),
            _targets(samples.test_labels, samples, kind, dtype, device),
        ),
        num_classes=samples.num_classes,
        input_shape=shape,
        notes=samples.notes,
    )


def _chosen(spec: ProblemSpec) -> Samples:
    samples = choose(
        spec.data.build(),
        spec.data.registered_name,
        spec.samples,
        spec.balanced,
        spec.test_samples,
    )
    return spec.data.encode(samples) if isinstance(spec.data, Encodes) else samples


def _num_outputs(samples: Samples) -> int:
    if samples.num_classes is not None:
        return samples.num_classes
    return int(np.prod(samples.train_labels.shape[1:]))


def _inputs(inputs: Any, samples: Samples, scale: Scaling, dtype: Any, device: Any) -> Tensor:
    import torch

    if samples.vocabulary is not None:
        return torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.int64)).to(device)
    scaled = torch.empty(inputs.shape, dtype=dtype)
    for part, values in scale.chunks(inputs):
        scaled[part] = torch.from_numpy(values)  # rounded to dtype here, once
    return scaled.to(device)


def _targets(labels: np.ndarray, samples: Samples, kind: str, dtype: Any, device: Any) -> Tensor:
    import torch

    if samples.num_classes is None:
        if kind == "class":
            raise invalid("loss", "a loss of classes", "'mse'", "the data set has no classes")
        values = torch.from_numpy(np.array(labels, dtype=np.float64)).to(dtype)
        return (values[:, None] if values.ndim == 1 else values).to(device)
    numbers = torch.from_numpy(np.array(labels, dtype=np.int64))
    if kind == "one-hot":
        return torch.nn.functional.one_hot(numbers, samples.num_classes).to(dtype).to(device)
    return numbers.to(device)


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Draw from a stream of this seed, in float32 on the CPU; restore everything after.

    Not `torch.manual_seed`, which would also seed every GPU. The stream is that of the seed and the
    word "initialization", so that it is not the one of the mini-batches of the same seed.
    """
    import torch

    state, default = torch.get_rng_state(), torch.get_default_dtype()
    content = hashlib.sha256(f"initialization {seed}".encode()).digest()
    try:
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(int.from_bytes(content[:8], "big") >> 1)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)
        torch.set_default_dtype(default)
