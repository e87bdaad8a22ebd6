"""A model, a loss and data as one deterministic function of a flat parameter vector.

L(theta) = sum_c w_c loss(chunk c; theta) / sum_c w_c, where w_c is the number of samples in the
chunk, or whatever weight the loss averages over (tokens, class weights). Value, gradient and
products with the Hessian are the same for every chunk size, up to rounding.

Example:
    >>> import torch
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> objective
    Objective(P=8, N=8, chunk_size=1024)
    >>> objective.gradient().shape
    torch.Size([8])
"""

from __future__ import annotations

import copy
import glob
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from thalweg.errors import DifferentiableOnce, InvalidInput, invalid
from thalweg.linalg import bits_of, require_finite
from thalweg.loss.batches import plain, refuse_rows
from thalweg.loss.chunk_multiplier import ChunkMultiplier
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.copies import SamplesInDtype, few_of, in_dtype
from thalweg.loss.cost import BACKWARD, FORWARD, Cost
from thalweg.loss.evaluation import Evaluation, Evaluator, entries, in_groups, mapped
from thalweg.loss.guards.agreement import Agreement, agreement
from thalweg.loss.guards.determinism import refuse_changing
from thalweg.loss.guards.differences import is_gradient
from thalweg.loss.guards.dtypes import run_dtype
from thalweg.loss.guards.failures import explained
from thalweg.loss.guards.generators import (
    generators_kept,
    refuse_other_seed,
    refuse_unfit_seed,
)
from thalweg.loss.guards.kinks import first_kink
from thalweg.loss.guards.memory import within_memory
from thalweg.loss.guards.wrapped import patterns_inside, unwrapped
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.linearization import ChunkedLinearization, GradientGraph
from thalweg.loss.points_at_once import PointsAtOnce
from thalweg.loss.product_choice import Product, ProductChoice
from thalweg.loss.protocol import Linearization, Loss
from thalweg.loss.reduce import Reduction, reduction_of
from thalweg.loss.samples import (
    Batch,
    BatchSamples,
    Samples,
    are_whole,
    as_samples,
    generators_of,
    read_order,
    refuse_unfit_indices,
)
from thalweg.loss.shards import (
    SAME_SAMPLES,
    is_shard,
    reduction_to_shards,
    refuse_unfit_shards,
    take_back,
)
from thalweg.loss.weighting import (
    Counted,
    batch_weight_of,
    candidates,
    is_torch_loss,
    refuse_unfit_batch,
    target_of,
)
from thalweg.loss.wrapped_module import (
    parallel_loss,
    parallel_value,
    parallel_value_and_gradient,
    wrapped_gradient,
)
from thalweg.sharding import Sharding
from thalweg.surroundings import shielded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Objective:
    """The loss of a model over a fixed data set, as a function of theta (P,); a `Loss`.

    Args:
        model: any module. It is never changed: parameters, buffers, other attributes, gradients
            and random state stay as they are, and so do the data. Out of `torch.compile` and
            `DistributedDataParallel` the model inside is taken. In bfloat16 or float16 it is
            evaluated in float32, and theta is in the widest dtype of its parameters.
        loss: `loss(output, target) -> scalar`, the mean over the batch; None for a model that
            returns the loss itself or an object with a `.loss`; or `ComputeLoss(compute)` for a
            trainer's own `compute(model, batch)`.
        data: a tuple `(inputs..., target)` or dict of tensors, a `Dataset`, a `DataLoader`, or a
            list of batches. Dict batches are passed to the model as keywords; a loss of torch then
            gets the entry 'labels' or 'target', and the model the others; a loss of your own gets
            `loss(output, batch)`.
        parameters: shell patterns of the names that make up theta; None for all that require a
            gradient.
        batch_weight: `batch_weight(batch) -> weight` of a batch in the mean, where the loss does
            not average over samples: `lambda b: (b["labels"] != -100).sum()` for tokens. Known by
            itself for `nn.CrossEntropyLoss` and `nn.NLLLoss` with class weights, ignored targets,
            or several targets a sample; found by trying, where another loss averages over the
            targets that are not ignored (-100), or over a mask.
        chunk_size: the most samples evaluated at once; bounds memory, changes only the rounding.
            "auto" is 1,024 on a CPU, and 8,192 elsewhere: a GPU spends a chunk's time on starting
            its operations.
        mode: "eval" evaluates with dropout off and batch norm at its running statistics; "train" in
            training mode, but for layers that are in evaluation mode now while the model is not.
            With "train" each batch of a list is a sample of its own, never cut and one at a time:
            N counts batches, and the loss is their mean, each counting the same without
            `batch_weight`. None takes the model as it is. Dropout in training mode needs `seed`,
            batch norm a list of batches and "train"; else they are refused, since they make the
            loss random or dependent on the chunk.
        seed: fixes random numbers of the generators of torch, NumPy and Python (dropout, a VAE's
            sampling): those of a chunk are drawn anew from the seed `seed` + 1,000,003 i, i its
            first sample, at each evaluation. Same samples in the same chunks, same numbers;
            another `chunk_size` draws others. None refuses a loss that draws.
        forward_dtype: `torch.bfloat16` or `torch.float16` to compute the matrix products of the
            forward pass, and of its derivatives, in it (autocast); None for the dtype of the
            parameters. Loss, gradient and products stay in that of the parameters.
        vectorize_up_to: samples in the largest chunk whose block of products is one vectorized
            backward pass, or a block of differences one of all its points, 0 for none; None
            measures (differences: goes by sizes). See `ChunkMultiplier`, `PointsAtOnce`.
        group: the processes of `torch.distributed` that share the loss: `data` are this process's
            samples, the loss is the mean over those of all, and all ask the same in the same order.
            None for this process alone; to be said where there are several. Those of a tensor
            parallel model all have the same samples, of which each counts once.
        reduction: closes the sums over samples in another way, see `reduce.py`; None for `group`'s.
        product: how products with the Hessian are made: "exact" by double backward, "difference"
            by central differences of gradients, which need no second derivative and are right to
            about 1e-5 of the largest product in float32; "auto" takes exact ones, and differences
            where there are none and the loss has no kinks. See `docs/products.md`. "wrapped", for a
            model in shards: differences of the gradients that FSDP gives, layer by layer.
        check: compare on a few samples, once, before the first result that depends on it: products
            with differences of gradients; where samples are evaluated in parts, the loss of a few
            with that of two parts of them. False to take what model and loss give.

    Attributes:
        multiplier: how blocks are multiplied: a `ChunkMultiplier`.
        at_once: the same of blocks of differences: a `PointsAtOnce`.
        cost: what was evaluated so far, by this process: a `Cost`.
        choice: how products are made, and why: a `ProductChoice`.

    Raises:
        InvalidInput: a dropout or batch-norm layer in training mode without what it needs, here or
            when the loss is evaluated; a seed that is no integer >= 0; several processes and no
            `group`; a parameter in complex numbers or 8 bits; empty data, no trainable parameter,
            model and data on two devices, an impossible chunk size, mode or dtype. At the first
            evaluation: a forward pass that changes parameters, a tensor that was computed from one
            before, checkpoints with `use_reentrant=True`.

    Values are in units of the loss, derivatives in those over theta; on the device of the
    parameters and in the dtype of theta. Example: see the module.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        data: object,
        *,
        parameters: Sequence[str] | str | None = None,
        batch_weight: Callable[[Batch], Tensor | float] | None = None,
        chunk_size: int | Literal["auto"] | None = "auto",
        mode: Literal["eval", "train"] | None = None,
        seed: int | None = None,
        forward_dtype: torch.dtype | None = None,
        vectorize_up_to: int | None = None,
        group: ProcessGroup | Literal["ask"] | None = "ask",
        reduction: Reduction | None = None,
        product: Product | Literal["wrapped"] = "auto",
        check: bool = True,
    ) -> None:
        number = chunk_size not in (None, "auto")
        if number and (not isinstance(chunk_size, Integral) or chunk_size < 1):
            allowed = "an integer >= 1, 'auto', or None for no limit"
            raise invalid("chunk_size", chunk_size, allowed)
        refuse_unfit_seed(seed)
        self.reduction = reduction_of(group) if reduction is None else reduction
        # The class of what was taken off the model, or "".
        self.wrapper = ""
        if (inside := unwrapped(model)) is not model:
            self.wrapper = type(model).__name__
            model, parameters = inside, patterns_inside(parameters)
        refuse_unfit_shards(model)
        take_back(model)
        self.model = model
        self.check = check
        self.multiplier = ChunkMultiplier(vectorize_up_to)
        self.at_once = PointsAtOnce(vectorize_up_to)
        with self.reduction.together():
            self.layout = ParameterLayout.from_model(model, parameters)
            like = self.layout.parameters(model)[0]
            self.samples: Samples = as_samples(data, like, whole=mode == "train")
            # Each sample a batch that is never cut: one at a time.
            self._whole = are_whole(self.samples)
            self.evaluator = Evaluator(
                model, loss, self.layout, mode, forward_dtype, seed=seed, whole=self._whole
            )
            self._refuse_other_devices()
        if self.layout.sharding is not None:
            self.reduction = reduction_to_shards(
                self.reduction, self.layout.sharding, same_samples=self.is_parallel
            )
        size = _default_chunk(self.device) if chunk_size == "auto" else chunk_size
        self.chunk_size = 1 if self._whole else size
        self.cost = Cost()
        # Whether errors of torch are told in other words; in copies they are caught, not told.
        self._tells = True
        self._samples_before, self._num_samples = self.reduction.place(len(self.samples))
        # None where nobody has said, and samples are counted unless they turn out not to count.
        known = batch_weight_of(loss)
        self.batch_weight = batch_weight or (None if self._whole else known)
        self._given_weight = batch_weight is not None
        self._mean: Agreement | None = None
        # Whether processes were seen to be at one point.
        self._same = False
        # Whether it was seen to be fixed; and whether evaluating draws random numbers to no effect.
        self._repeatable = self._draws = False
        self._total_weight: float | None = None
        rounding = torch.finfo(forward_dtype or self._coarsest()).eps
        self._wrapped = product == "wrapped" and not self.is_parallel
        # Whether a gradient by FSDP, or of tensor parallel layers, was seen to be that of the loss.
        self.wrapped_is_checked = False
        if self._wrapped and self.sharding is None:
            raise invalid("product", product, "'auto', 'exact' or 'difference' of a whole model")
        self.choice = ProductChoice("difference" if product == "wrapped" else product, rounding)
        if self.is_parallel:
            self._refuse_unfit_parallel()

    @property
    def product(self) -> Product:
        """How products are made: "exact" or "difference"; "auto" while neither is known to work."""
        return self.choice.taken

    @property
    def is_parallel(self) -> bool:
        """Whether the model is tensor parallel: processes evaluate the same samples together."""
        return self.evaluator.is_parallel

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return self.layout.num_parameters

    @property
    def sharding(self) -> Sharding | None:
        """Which of theta's numbers each process holds, of a model in shards; else None."""
        return self.layout.sharding

    @property
    def num_samples(self) -> int:
        """N, the number of samples, of all processes."""
        return self._num_samples

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.layout.parameters(self.model)[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of theta: the widest of the parameters', at least float32."""
        return self.layout.dtype(self.model)

    @classmethod
    def from_batches(
        cls,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        batches: Iterable[Batch],
        n: int = 20,
        **options: Any,
    ) -> Self:
        """The loss over the first n batches of a stream, taken once and held on the model's device.

        For data without an end or an order: a `DataLoader` that shuffles or augments, or is over an
        `IterableDataset`, a generator, or an `IterableDataset` that gives whole batches.

        Args:
            model, loss: as for `Objective`.
            batches: gives tuples `(inputs..., target)` or dicts of tensors. What it draws from
                shared random numbers, or from the generator of a `DataLoader`, is put back.
            n: how many to take, >= 1; fewer where it ends before.
            options: the keywords of `Objective`.

        Raises:
            InvalidInput: n < 1; a stream without a batch, or of something that is no batch.

        Example:
            >>> stream = ((torch.randn(4, 3), torch.randn(4, 2)) for _ in range(1000))
            >>> Objective.from_batches(torch.nn.Linear(3, 2), torch.nn.MSELoss(), stream, n=5)
            Objective(P=8, N=20, chunk_size=1024)
        """
        if n < 1:
            raise invalid("n", n, "an integer >= 1")
        if not isinstance(batches, Iterable):
            raise invalid("batches", type(batches).__name__, "a DataLoader or a stream of batches")
        like = next(model.parameters(), torch.empty(0, device="cpu"))
        device = like.device
        with generators_kept(device, generators_of(batches)):
            taken = list(itertools.islice(batches, n))
        for batch in taken:
            refuse_rows(batch)
        there = [
            tree_map(lambda leaf: _on(leaf, device), plain(batch, like=like)) for batch in taken
        ]
        return cls(model, loss, there, **options)

    @property
    def targets_per_sample(self) -> int:
        """How many classes a sample asks for, such as the tokens of a sequence; 1 elsewhere."""
        target: Any = None
        with suppress(InvalidInput, LookupError, TypeError):  # a batch without one
            target = target_of(self.first_batch())
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            return 1
        return math.prod(target.shape[1:])

    def parameters(self) -> list[nn.Parameter]:
        """The model's own parameters that make up theta, in its order."""
        take_back(self.model)
        return self.layout.parameters(self.model)

    @shielded()
    def theta(self) -> Tensor:
        """A copy of the model's current parameters, (P,)."""
        return self.evaluator.theta()

    def write(self, theta: Tensor) -> None:
        """Set the model's parameters to theta (P,).

        Raises:
            InvalidInput: theta has another length than P.
        """
        take_back(self.model)
        self.layout.write(self.model, theta)

    @shielded()
    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar tensor.

        Args:
            theta: the point (P,); None for the model's current parameters.
            samples: indices of the samples to average over, int64 (n,); None for all.

        Raises:
            InvalidInput: theta has another length than P; indices that name no samples; a loss
                that is no scalar, or draws random numbers.
            Diverged: the loss, or its gradient, is NaN or infinite.

        Warns:
            ChunkHalved: memory did not suffice for a chunk.
        """

        def compute() -> Tensor:
            with self.evaluator.at_point(theta):
                weight = self.prepared(theta, samples)

                def own() -> tuple[Tensor]:
                    if self.is_parallel:
                        return (parallel_value(self, theta, samples, weight),)
                    return (within_memory(self, lambda: self._value(theta, samples, weight)),)

                return self.reduction.sums(own, self._zero())[0]

        return require_finite(self.choice.unless_once(self, compute), "the loss")

    def gradient(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss, (P,). See `value` for arguments and errors."""
        return self.value_and_gradient(theta, samples)[1]

    @shielded()
    def weight(self, samples: Tensor | None = None) -> float:
        """The weight of samples in the mean: their number, or the sum of their batch weights.

        The mean over a union of disjoint sets is that of their means, with these weights.

        Raises:
            InvalidInput: the batch weights have no positive sum.
        """
        if samples is not None:
            self.require_mean()
        if self.batch_weight is None:
            return float(self.num_samples if samples is None else len(samples))
        if samples is None and self._total_weight is not None:
            return self._total_weight
        weigh = self.batch_weight

        def own() -> float:
            chunks = self.samples.chunks(self._own(samples), self.chunk_size)
            return sum(float(weigh(batch)) for batch, _ in chunks)

        total = self.reduction.total_of(lambda: within_memory(self, own))
        if not total > 0:
            raise invalid("batch_weight", total, "a positive sum over all batches")
        if samples is None:
            self._total_weight = total
        return total

    @shielded()
    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradient (P,) from one pass. See `value` for arguments and errors."""

        def compute() -> tuple[Tensor, ...]:
            with self.evaluator.at_point(theta):
                weight = self.prepared(theta, samples)

                def own() -> tuple[Tensor, Tensor]:
                    if self.is_parallel:
                        return parallel_value_and_gradient(self, theta, samples, weight)
                    return within_memory(
                        self, lambda: self._value_and_gradient(theta, samples, weight)
                    )

                return self.reduction.sums(own, self._zero())

        value, gradient = self.choice.unless_once(self, compute)
        return require_finite(value, "the loss"), require_finite(gradient, "the gradient")

    def linearize(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> Linearization:
        """The gradient and products with the Hessian: what the operator `Hessian` is made of.

        See `product` for how they are made.

        Args:
            theta: the point (P,); None for the model's parameters as they are now (copied).
            samples: indices of the samples to average over, int64 (n,); None for all.
            keep_graph: hold the graphs of all chunks between products, at the price of their
                memory.
        """
        point = self.theta() if theta is None else theta
        weight = self.choice.unless_once(self, lambda: self.prepared(point, samples))

        def graphs() -> Iterator[GradientGraph]:
            for evaluation in self.evaluations(point, samples, weight=weight):
                gradient = self.gradient_of(evaluation, create_graph=True)
                yield GradientGraph(
                    evaluation.fraction,
                    evaluation.samples,
                    evaluation.leaves,
                    gradient,
                    evaluation.at,
                )

        def exact() -> ChunkedLinearization:
            if self.is_parallel:
                raise DifferentiableOnce(f"model: {PARALLEL}")
            return ChunkedLinearization(self, point, graphs, keep_graph=keep_graph)

        return self.choice.linearization(
            self,
            exact,
            self._gradient_at(samples, weight),
            point,
            checks=samples is None,
            at_once=lambda points: self.at_once.gradients(self, points, point, samples, weight),
        )

    def _gradient_at(self, samples: Tensor | None, weight: float) -> Callable[[Tensor], Tensor]:
        """What differences are made of."""
        if self._wrapped:
            return lambda moved: wrapped_gradient(self, moved, samples, weight)
        return lambda moved: self.value_and_gradient(moved, samples)[1]

    def copied(
        self, dtype: torch.dtype, around: Callable[[Any], Any] = lambda function: function
    ) -> Self:
        """The same loss of a copy of the model in another dtype, unchecked and in one chunk.

        Args:
            around: wraps the forward pass and a loss that is none of torch's.

        Raises:
            InvalidInput: a large model, see `copies.py`.
            Exception: whatever a model raises that cannot be copied.
        """
        model, loss = self.evaluator.copied_model(dtype), in_dtype(self.evaluator.loss, dtype)
        model.forward = around(model.forward)
        copied = type(self)(
            model,
            _wrapped(loss, around),
            SamplesInDtype(self.samples, dtype),
            parameters=[glob.escape(name) for name in self.layout.names],
            batch_weight=self.batch_weight,
            chunk_size=None,
            mode=self.evaluator.mode,
            seed=self.evaluator.seed,
            group=None,
            product="exact" if self.choice.is_exact else "difference",
            check=False,
        )
        copied._tells = False
        copied.evaluator.hold_out(self.evaluator)
        return copied

    def explained(self, error: Exception) -> Exception | None:
        """What to raise for an error in model or loss, see `guards/failures.py`; None: itself."""

        def alone(copied: bool) -> tuple[Self, Tensor]:
            return self.copied(self.dtype) if copied else self.unchecked(), few_of(
                len(self.samples)
            )

        # Where layers of a tensor parallel model are tried, all processes have to do so together.
        return explained(error, self, alone) if self._tells and not self.is_parallel else None

    def unchecked(self, *, tells: bool = False) -> Self:
        """The same loss of the same model, without checks, and of this process alone.

        Of a tensor parallel model, which a process cannot evaluate alone, of all as before.

        Args:
            tells: errors of torch are told in other words, see `explained`.
        """
        alone = copy.copy(self)
        alone.check, alone._tells = False, tells
        if self.is_parallel:
            alone.choice = ProductChoice("difference", self.choice.steps.rounding)
            return alone
        alone.reduction = Reduction()
        alone.evaluator = self.evaluator.alone()
        alone.layout, alone._wrapped = alone.evaluator.layout, False
        alone._samples_before, alone._num_samples = 0, len(self.samples)
        alone._total_weight = None
        # In what is tried nothing is chosen.
        way: Product = "exact" if self.choice.is_exact else "difference"
        alone.choice = ProductChoice(way, self.choice.steps.rounding)
        return alone

    def state_dict(self) -> dict[str, Any]:
        """The chunk size and the way to multiply, as far as they were found while running.

        And the seed, where there is one: what is random continues with it alone. And steps, where
        products are differences.
        """
        seed = {} if self.evaluator.seed is None else {"seed": self.evaluator.seed}
        found = {"multiplier": self.multiplier.state_dict(), "chunk_size": self.chunk_size}
        differences = {} if self.choice.is_exact else {"at_once": self.at_once.state_dict()}
        return found | seed | self.choice.state_dict() | differences

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InvalidInput: it is that of a loss with another seed, or with differences where exact
                products are asked for.
        """
        self.choice.load_state_dict(state)
        refuse_other_seed(self.evaluator.seed, state)
        # Until 0.1 it was called "products".
        former = state.get("products")
        self.multiplier.load_state_dict(state["multiplier"] if former is None else former)
        self.chunk_size = state["chunk_size"]
        # Until 0.1 there was none.
        if "at_once" in state:
            self.at_once.load_state_dict(state["at_once"])

    def evaluations(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        apart: bool = False,
        weight: float | None = None,
    ) -> Iterator[Evaluation]:
        """Outputs and loss of each chunk, with their graph; drop one to free its memory.

        What operators of a model's outputs are built on.

        Args:
            apart: the loss is one of outputs of which none is computed from another, see
                `outputs.py`; it cannot take derivatives of one by another then.
            weight: what `prepared` gave, see there.
        """
        yield from self._evaluations(theta, samples, weight, apart=apart)

    def _evaluations(
        self,
        theta: Tensor | None,
        samples: Tensor | None,
        weight: float | None = None,
        *,
        apart: bool = False,
        twice: bool = True,
    ) -> Iterator[Evaluation]:
        pieces = self.evaluator.pieces(theta)
        for batch, count, fraction, first in self.chunks(samples, weight=weight):
            self.cost.add(count, FORWARD)
            outputs, loss, at = self.evaluator.evaluate(
                pieces, batch, first, apart=apart, twice=twice
            )
            require_finite(loss.detach(), "the loss")
            yield Evaluation(fraction, count, at.leaves, outputs, loss, at)

    def evaluations_of_each(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        batch_size: int = 1,
        *,
        weight: float | None = None,
    ) -> Iterator[Evaluation]:
        """Evaluations whose outputs are the losses of single samples, or of batches.

        Args:
            batch_size: b, a divisor of the number of samples; a batch is b samples in their order.
            weight: what `prepared` gave, see there.

        Yields:
            Evaluations with outputs (losses (n,), weights (n,)), the weights of sum 1.

        Raises:
            InvalidInput: a batch size that does not divide the number of samples.
        """
        self.require_mean()
        if self._whole or self.evaluator.seed is not None:
            yield from self._one_by_one(theta, samples, batch_size, weight)
            return
        size = None if self.chunk_size is None else max(1, self.chunk_size // batch_size)
        pieces = self.evaluator.pieces(theta)
        most = size and size * batch_size
        for batch, count, fraction, _ in self.chunks(samples, most, weight=weight):
            if count % batch_size:
                raise invalid("batch_size", batch_size, f"a divisor of {count}, the data's batch")
            parts = in_groups(batch, batch_size)
            weights = self._weights_of_each(parts, count // batch_size)
            # A batch in which every target is ignored has the mean 0/0.
            parts, weights = entries(parts, weights > 0), weights[weights > 0]
            self.cost.add(count, FORWARD)
            losses, at = self.evaluator.evaluate_each(pieces, parts, len(weights))
            with at:
                loss = losses @ weights
            require_finite(loss.detach(), "the loss")
            yield Evaluation(fraction, count, at.leaves, (losses, weights), loss, at)

    def _one_by_one(
        self, theta: Tensor | None, samples: Tensor | None, batch_size: int, weight: float | None
    ) -> Iterator[Evaluation]:
        """See `evaluations_of_each`: where `vmap` would mix batches, or draw for all at once."""
        pieces = self.evaluator.pieces(theta)
        for batch, count, fraction, first in self.chunks(samples, batch_size, weight=weight):
            if count % batch_size:
                raise invalid("batch_size", batch_size, f"a divisor of {count}, the data's batch")
            self.cost.add(count, FORWARD)
            _, loss, at = self.evaluator.evaluate(pieces, batch, first)
            require_finite(loss.detach(), "the loss")
            with at:
                outputs = loss.reshape(1), loss.new_ones(1)
            yield Evaluation(fraction, count, at.leaves, outputs, loss, at)

    def gradient_of(
        self, evaluation: Evaluation, *, create_graph: bool = False, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradient of a chunk's mean loss, shaped like the parameters, not weighted.

        Args:
            create_graph: it can be differentiated again.
            retain_graph: the evaluation's own graph is wanted again.

        Raises:
            InvalidInput: the loss does not depend on any parameter.
        """
        self.cost.add(evaluation.samples, BACKWARD)
        return self.evaluator.gradient(
            evaluation, create_graph=create_graph, retain_graph=retain_graph
        )

    def _value(self, theta: Tensor | None, samples: Tensor | None, weight: float) -> Tensor:
        total = self._zero()
        pieces, twice = self.evaluator.pieces(theta), self.choice.is_exact
        for batch, count, fraction, first in self.chunks(samples, weight=weight):
            self.cost.add(count, FORWARD)
            # With a graph, as for the gradient: without one torch and models may compute another
            # function.
            loss = self.evaluator.evaluate(pieces, batch, first, twice=twice)[1]
            total = total + fraction * loss.detach()
        return require_finite(total.to(self.dtype), "the loss")

    def _value_and_gradient(
        self, theta: Tensor | None, samples: Tensor | None, weight: float
    ) -> tuple[Tensor, Tensor]:
        value = self._zero()
        gradient = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        twice = self.choice.is_exact
        for evaluation in self._evaluations(theta, samples, weight, twice=twice):
            parts = self.layout.in_one_piece.flatten(self.gradient_of(evaluation))
            gradient.add_(parts, alpha=evaluation.fraction)
            value = value + evaluation.fraction * evaluation.loss.detach()
        return value.to(self.dtype), gradient

    def first_kink(self) -> str:
        """The first operation with a kink, see `guards/kinks.py`, on a few samples."""
        alone, few = self.unchecked(), few_of(len(self.samples))

        def evaluate() -> Tensor:
            if self.is_parallel:
                return parallel_loss(alone, few)
            return next(alone._evaluations(None, few, twice=False)).loss

        with generators_kept(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return first_kink(self.model, evaluate)

    def has_gradient(self) -> bool:
        """Whether there is a first derivative, and it is that of the loss, on a few samples."""
        few = few_of(len(self.samples))
        with generators_kept(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return is_gradient(self.unchecked(), few, rough=self.is_rough)
            except Exception:  # whatever it is, differences would meet it too
                return False

    def _coarsest(self) -> torch.dtype:
        """The dtype of the model's parameters with the largest rounding, as it is evaluated."""
        dtypes = {run_dtype(parameter.dtype) for parameter in self.parameters()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _weights_of_each(self, parts: Batch, count: int) -> Tensor:
        """The fraction (n,) of each of the stacked batches in the mean of their losses."""
        if self.batch_weight is None:
            return torch.full((count,), 1 / count, dtype=self.dtype, device=self.device)
        weigh, kind = self.batch_weight, {"dtype": self.dtype, "device": self.device}
        # At once, where a weight for each would wait for a GPU as often as there are samples.
        found = mapped(lambda part: torch.as_tensor(weigh(part), **kind), count, parts)
        return found / found.sum()

    def chunks(
        self, samples: Tensor | None, size: int | None = None, *, weight: float | None = None
    ) -> Iterator[tuple[Batch, int, float, int]]:
        """Each chunk of this process, its size, its weight in the mean, and its first sample.

        Args:
            samples: indices, int64 (n,); None for all.
            size: the most samples in a chunk; None for `chunk_size`.
            weight: what `prepared` gave, see there.
        """
        # Where batches are weighed, the data is read twice rather than held in memory.
        total = self.prepared(None, samples, size) if weight is None else weight
        own, at = self._own(samples), 0
        order: Sequence[int] = ()
        if self.evaluator.seed is not None:
            order = read_order(self.samples, own)
        with generators_kept(self.device) if self._draws else nullcontext():
            for batch, count in self.samples.chunks(own, size or self.chunk_size):
                own_weight = count if self.batch_weight is None else float(self.batch_weight(batch))
                first, at = self._samples_before + order[at] if order else 0, at + count
                # A chunk in which every target is ignored has the mean 0/0.
                if own_weight:
                    yield batch, count, own_weight / total, first

    @shielded()
    def prepared(
        self,
        theta: Tensor | None,
        samples: Tensor | None = None,
        size: int | None = None,
        *,
        of_each: bool = False,
    ) -> float:
        """What processes find out together before each evaluates its own samples.

        Once, whether all are at one point and whether the loss can be evaluated in parts, see
        `is_mean`; each time the weight of the samples. No sum is closed afterwards while chunks are
        evaluated with that weight, so that a process which fails, or begins again with smaller
        chunks, leaves none waiting.

        Args:
            theta: the point (P,); None for the model's parameters.
            samples, size: as for `chunks`.
            of_each: samples are evaluated one by one, as by `evaluations_of_each`.

        Returns:
            The weight of the samples in the mean.

        Raises:
            InvalidInput: indices that name no samples; another theta in each process; a loss that
                draws random numbers, or is no mean; batch weights without a positive sum.
        """
        if samples is not None:
            refuse_unfit_indices(samples, self.num_samples)
        if not self._same:
            self.reduction.require_same("theta", lambda: self._bits(theta), _BY_ONE_START)
            if self.is_parallel:
                self.reduction.require_same("data", self._bits_of_data, SAME_SAMPLES)
            self._same = True
        self._require_repeatable()
        if of_each or samples is not None or self._in_parts(size or self.chunk_size):
            self.require_mean()
        return self.weight(samples)

    def _bits(self, theta: Tensor | None) -> str:
        """What is to be the same in all processes: of parameters in shards, those that are none."""
        if self.sharding is None:
            return bits_of(self.theta() if theta is None else theta)
        alike = [p.detach().reshape(-1) for p in self.parameters() if not is_shard(p)]
        return bits_of(torch.cat(alike).to(self.dtype)) if alike else ""

    def _bits_of_data(self) -> str:
        """What tells the samples of two processes apart."""
        batches = self.samples.chunks(few_of(len(self.samples)), None)
        leaves = [leaf for batch, _ in batches for leaf in tree_leaves(batch)]
        return " ".join(bits_of(leaf.double()) for leaf in leaves if isinstance(leaf, Tensor))

    @property
    def is_rough(self) -> bool:
        """Whether the forward pass is in lower precision than the parameters."""
        return self.evaluator.forward_dtype is not None

    def is_mean(self) -> bool:
        """Whether the loss of samples is the mean of those of their parts, as far as was looked.

        Looked once, on a few samples, see `guards/agreement.py`. Where nobody has said what the
        loss averages over, `batch_weight` becomes what it turns out to be. True without `check`.
        """
        if not self.check or self._whole:
            return True
        if self._mean is None:
            alone = self.unchecked()
            with self.reduction.together():
                tried = self._candidates()
                size = self.chunk_size or len(self.samples)
                found = agreement(alone, tried, size)
                one = self.first_batch()
                weights = [float(weigh(one)) if tried[1:] else 1.0 for weigh in tried]
            self._mean = self._of_all(found, weights)
            if self.batch_weight is None and self._mean.fits and self._mean.fits[0]:
                self.batch_weight = tried[self._mean.fits[0]]
        return bool(self._mean.fits) and not self._mean.ambiguous

    def _require_repeatable(self) -> None:
        """Once: refuse a loss that changes from call to call, whatever the source of chance."""
        if self._repeatable or not self.check:
            return
        alone, few = self.unchecked(), few_of(len(self.samples))
        rough = self.is_rough or self.dtype not in (torch.float32, torch.float64)
        with self.reduction.together():
            self._draws = refuse_changing(
                lambda: float(alone.value(samples=few)), self.device, rough
            )
        self._repeatable = True

    def _candidates(self) -> Sequence[Callable[[Batch], Any]]:
        """What the loss may average over: what is known, or what is to be tried."""
        if self.batch_weight is not None:
            return [self.batch_weight]
        if is_torch_loss(self.evaluator.loss):
            return [Counted()]
        return candidates(self.first_batch())

    def _of_all(self, found: Agreement, weights: Sequence[float]) -> Agreement:
        """The agreement of all processes, which may hold different samples.

        Args:
            weights: that of the first sample by each candidate.
        """
        total = self.reduction.total
        processes = total(1.0)
        if processes == 1:
            return found
        # A process that can say nothing is in nobody's way.
        silent = bool(found.note)
        fits = tuple(
            number
            for number in range(len(weights))
            if total(float(silent or number in found.fits)) == processes
        )
        # In each process all samples may weigh the same, and elsewhere something else.
        uneven = [processes * total(weight**2) != total(weight) ** 2 for weight in weights]
        ambiguous = total(float(found.ambiguous)) > 0 or any(uneven[number] for number in fits)
        # Told of the process where it is worst.
        told = [text.split() for text in self.reduction.gathered(f"{found.apart} {found.samples}")]
        apart, samples = max((float(apart), int(samples)) for apart, samples in told)
        known = {"fits": fits, "ambiguous": ambiguous and 0 in fits}
        return replace(found, **known, apart=apart, samples=samples)

    def require_mean(self) -> None:
        """Refuse a loss that is no mean over samples, nor over anything that was found.

        Raises:
            InvalidInput: it is not, see `is_mean`.
        """
        if self.is_mean():
            return
        assert self._mean is not None
        raise InvalidInput(_no_mean(self._mean, self._given_weight))

    def _in_parts(self, size: int | None) -> bool:
        """Whether all samples make more than one chunk."""
        count = len(self.samples)
        if count != self.num_samples or (size is not None and size < count):
            return True
        return isinstance(self.samples, BatchSamples) and len(self.samples.batches) > 1

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def first_batch(self) -> Batch:
        """A batch of one sample of this process."""
        return next(iter(self.samples.chunks(torch.zeros(1, dtype=torch.int64, device="cpu"), 1)))[
            0
        ]

    def _own(self, samples: Tensor | None) -> Tensor | None:
        """The samples among these that this process holds, by their indices in it."""
        count = len(self.samples)
        if samples is None or count == self.num_samples:
            return samples
        begin = self._samples_before
        return samples[(samples >= begin) & (samples < begin + count)] - begin

    def _refuse_unfit_parallel(self) -> None:
        """Raise for what a tensor parallel model does not have."""
        if self.choice.given == "exact":
            raise invalid("product", "exact", "'auto' or 'difference'", PARALLEL)
        if self.sharding is None:
            hint = "take such with them that parallelize_module has divided"
            raise invalid("parameters", "none that is a DTensor", "some of them", hint)
        if self.evaluator.is_low:
            allowed = "parameters in float32 or float64, of which differences can be made"
            raise invalid("model", "one in low precision", allowed, "forward_dtype=torch.bfloat16")

    def _refuse_other_devices(self) -> None:
        """Raise where model and data do not live together, before torch fails somewhere inside."""
        parameters = {p.device for p in self.model.parameters()}
        if len(parameters) > 1:
            given = ", ".join(sorted(map(str, parameters)))
            raise invalid("model", f"parameters on {given}", "one device", "call model.to(device)")
        batch = self.first_batch()
        refuse_unfit_batch(batch, self.model, self.evaluator.loss)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.device != self.device:
                allowed = f"on {self.device}, like the model"
                raise invalid("data", f"on {leaf.device}", allowed, "move one of them")

    def __repr__(self) -> str:
        return (
            f"Objective(P={self.num_parameters}, N={self.num_samples},"
            f" chunk_size={self.chunk_size}{self.choice})"
        )


PARALLEL = (
    "second derivatives through tensor parallel layers are wrong, without an error; differences of"
    " gradients are right, where the gradient is that of the loss (a straight-through one is not)"
)
_BY_ONE_START = (
    "all processes ask for the loss at one point: wrap the model in DistributedDataParallel, or"
    " build and load it in the same way in each"
)


def _no_mean(found: Agreement, given: bool) -> str:
    """The message of the error, and the hint."""
    if found.ambiguous:
        return (
            "loss: it may average over samples or over targets, and batches differ in how many"
            " targets a sample has; pass batch_weight=lambda batch: ..., what the loss of a batch"
            " divides by: (batch['labels'] != -100).sum(), or the number of samples"
        )
    message = (
        f"loss: of {found.samples} samples it is {found.apart:.2%} off the mean of the losses of"
        " two parts of them, so results would depend on chunk_size"
    )
    if found.is_sum:
        hint = "it is a sum: divide it by the number of samples (reduction='mean')"
    elif given:
        hint = "batch_weight is to give what the loss of a batch divides by"
    else:
        hint = (
            "pass batch_weight=, what the loss of a batch divides by (with weights w of classes:"
            " lambda batch: w[batch[-1]].sum(); with ignored targets: lambda batch:"
            " (batch[-1] != -100).sum())"
        )
    return (
        f"{message}; {hint}; where samples of a batch see one another in the model, there is no"
        " such weight: evaluate all in one chunk (chunk_size=None, without trackers), or give a"
        " list of batches with mode='train', each a sample of its own"
    )


def _wrapped(loss: Any, around: Callable[[Any], Any]) -> Any:
    """A loss inside of a wrapper, but for those of torch, which hold no values."""
    if isinstance(loss, ComputeLoss):
        return ComputeLoss(around(loss.compute))
    return loss if loss is None or is_torch_loss(loss) else around(loss)


def require_objective(loss: Loss, name: str, needs: str) -> Objective:
    """Narrow a loss to an `Objective`, whose outputs and single samples are known.

    Args:
        name: who needs that.
        needs: what of it.

    Raises:
        InvalidInput: another kind of loss.
    """
    if isinstance(loss, Objective):
        return loss
    raise invalid("loss", type(loss).__name__, f"an Objective: {name} needs {needs}")


def _default_chunk(device: torch.device) -> int:
    return 1024 if device.type == "cpu" else 8192


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf
