"""A model and its loss on one batch, with the graph from the parameters to outputs and loss."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from thalweg.errors import InvalidInput, invalid, level_of_caller
from thalweg.loss.batches import PerSample, mapped_leaves
from thalweg.loss.chunk_multiplier import derivatives
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.copies import in_dtype
from thalweg.loss.guards.constant_draws import ConstantDraws
from thalweg.loss.guards.determinism import (
    mode_dependent_layers,
    no_random_numbers,
    refuse_unfit_layers,
)
from thalweg.loss.guards.dtypes import InFloat32, is_low, raised
from thalweg.loss.guards.generators import begun_at
from thalweg.loss.guards.graph import (
    GraphFacts,
    ReadsOf,
    facts_of,
    place_in_time,
    refuse_computed_before,
    refuse_reentrant,
    refuse_scaled_by_count,
)
from thalweg.loss.guards.memory import is_out_of_memory
from thalweg.loss.guards.precision import has_recurrent_layers, twice_differentiable
from thalweg.loss.guards.sparse import Dense, layers_with_sparse_gradients
from thalweg.loss.guards.wrapped import own_forward
from thalweg.loss.large_operations import LargeOperations, Sought
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.outputs import separated, tensors_of
from thalweg.loss.samples import Batch
from thalweg.loss.shards import copies_of, is_shard, is_tensor_parallel, take_back, whole, whole_of
from thalweg.loss.swapped import Overwritten, Places, Replaced, Swapped
from thalweg.loss.weighting import is_torch_loss, target_name
from thalweg.sharding import ShardedVector
from thalweg.surroundings import one_path, shielded

_EVALUATING: ContextVar[bool] = ContextVar("evaluating", default=False)

BETWEEN_SAMPLES = 1_000_003
"""How far apart the seeds of two samples are: more than those of a few repetitions."""


def is_evaluating() -> bool:
    """Whether a forward or backward pass is Thalweg's own, as seen by a hook of the model."""
    return _EVALUATING.get()


class Evaluation(NamedTuple):
    """One chunk of samples, evaluated.

    Attributes:
        fraction: the weight of the chunk in the mean over all that was asked for.
        samples: how many samples the chunk has.
        leaves: the parameters, leaves of the graph.
        outputs: the model's outputs that depend on the parameters, see `outputs.py`. Empty where
            the model returns nothing but its loss.
        loss: the mean loss of the chunk, a scalar.
        at: the model at the leaves, entered around every backward pass through the graph.
    """

    fraction: float
    samples: int
    leaves: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    loss: Tensor
    at: Swapped


class Point(NamedTuple):
    """A point of a model in shards, whole.

    Attributes:
        theta: all P numbers, a plain tensor.
        others: parameters that are shards and no part of theta, each with its whole.
        source: the vector it was gathered from; None for the parameters as they are.
    """

    theta: Tensor
    others: tuple[tuple[Tensor, Tensor], ...]
    source: Tensor | None


class Evaluator:
    """A model and its loss on single batches, at any parameters, without a trace in the model.

    Neither parameters, buffers and other attributes of the model nor the batch are changed, also
    where the forward pass writes into them: it works on copies, and attributes are put back.

    Found at the first evaluation, from the loss's graph, which costs 1 to 2 us for each operation:
    whether the model reaches a parameter by another road than the module's attribute, a closure or
    a list (then its own parameters hold the point's values while a pass lasts), and whether
    gradients would be sparse (they are made dense).

    Args:
        model, loss, mode, forward_dtype, seed: as for `Objective`.
        layout: which of the model's parameters make up theta.
        whole: batches are evaluated as they were given, each a sample.

    Attributes:
        drawn: whose random numbers evaluations have drawn, where `seed` fixes them.

    Raises:
        InvalidInput: another mode or dtype; dropout or batch norm in training mode. At an
            evaluation: a tensor computed from a parameter before, a forward pass that changes
            parameters, checkpoints with `use_reentrant=True`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        layout: ParameterLayout,
        mode: Literal["eval", "train"] | None,
        forward_dtype: torch.dtype | None,
        *,
        seed: int | None = None,
        whole: bool = False,
    ) -> None:
        if mode not in (None, "eval", "train"):
            raise invalid("mode", mode, "None, 'eval' or 'train'")
        if forward_dtype not in (None, torch.bfloat16, torch.float16):
            raise invalid("forward_dtype", forward_dtype, "None, torch.bfloat16 or torch.float16")
        self.model = model
        self.loss = loss
        self.layout = layout
        self.mode: Literal["eval", "train"] | None = mode
        self.forward_dtype = forward_dtype
        self.seed = seed
        self.drawn: set[str] = set()
        self._whole, self._alike = whole, False
        # What a model in training mode holds out of it, such as batch norm of a frozen part.
        self._held_out = {m for m in model.modules() if model.training and not m.training}
        self._loss_of_batch = LossOfBatch(model, loss)
        self._unused: set[str] = set()
        self._mode_dependent = mode_dependent_layers(model)
        self._recurrent = has_recurrent_layers(model)
        self._with_sparse_gradients = layers_with_sparse_gradients(model)
        self._low = is_low(model.parameters())
        # What the first evaluation finds. The parameters of a TorchScript module cannot be swapped.
        self._looked = False
        self._overwrite = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        self._sparse = self._writes = self._reentrant = False
        self._recomputes: bool | None = None
        self._large = Sought()
        # Of a model in shards: where it is evaluated, while a pass lasts.
        self._parallel = is_tensor_parallel(model)
        self._sharded = any(map(is_shard, model.parameters())) and not self._parallel
        self._point: Point | None = None
        self.refuse_unfit_mode()

    def hold_out(self, other: Evaluator) -> None:
        """Hold the same layers out of training mode as that of another copy of the model."""
        pairs = zip(self.model.modules(), other.model.modules(), strict=True)
        self._held_out = {own for own, theirs in pairs if theirs in other._held_out}

    def refuse_unfit_mode(self) -> None:
        """Raise where a layer would be evaluated in a mode in which it cannot be: see the class."""
        fixed = self.seed is not None
        refuse_unfit_layers(self._mode_dependent, self._in_training, drawn=fixed, whole=self._whole)

    def _in_training(self, module: nn.Module) -> bool:
        """Whether it is evaluated in training mode."""
        if self.mode is None:
            return module.training
        return self.mode == "train" and module not in self._held_out

    @property
    def is_parallel(self) -> bool:
        """Whether several processes compute its layers together, with the same samples."""
        return self._parallel

    @property
    def is_low(self) -> bool:
        """Whether the model was in lower precision than float32 when this was built."""
        return self._low

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.model.parameters()).device

    @contextmanager
    def settings(self, *, twice: bool = True) -> Iterator[None]:
        """What every pass needs, forward and backward: see `shielded`, and the mode as asked for.

        Dense gradients, and layers that can be differentiated twice, where that is wanted.
        """
        # At every evaluation: a model built in evaluation mode is switched when it is trained.
        self.refuse_unfit_mode()
        switched = []
        if self.mode is not None:
            switched = [m for m in self.model.modules() if m.training != self._in_training(m)]
        for module in switched:
            module.training = not module.training
        sparse = [layer for layer in self._with_sparse_gradients if layer.sparse]
        for layer in sparse:
            layer.sparse = False
        evaluating = _EVALUATING.set(True)
        try:
            with ExitStack() as stack:
                stack.enter_context(shielded())
                stack.enter_context(own_forward(self.model))
                if twice:
                    stack.enter_context(one_path())
                if twice and self._large.wanted:
                    stack.enter_context(LargeOperations(self._large))
                if twice and self._recurrent:
                    stack.enter_context(twice_differentiable(self._recurrent))
                if self._sparse:
                    stack.enter_context(Dense())
                if self._low:
                    stack.enter_context(InFloat32())
                yield
        finally:
            _EVALUATING.reset(evaluating)
            for layer in sparse:
                layer.sparse = True
            for module in switched:
                module.training = not module.training

    @contextmanager
    def forward_precision(self) -> Iterator[None]:
        """Autocast, where the forward pass alone is to be in another dtype."""
        if self.forward_dtype is None:
            yield
            return
        # A copy that autocast keeps would be that of a parameter at another point.
        with torch.autocast(
            self.device.type, self.forward_dtype, cache_enabled=not self._overwrite
        ):
            yield

    @contextmanager
    def at_point(self, theta: Tensor | None, known: Point | None = None) -> Iterator[Point | None]:
        """Hold a model in shards whole at theta while it lasts; nothing to do for any other.

        All processes that share the parameters enter together, and evaluate inside of it without
        one another: as often as they like, also where one of them fails.

        Args:
            theta: this process's part, or all P numbers; None for the parameters as they are.
            known: what another entry at the same theta has given: nothing is gathered then.
        """
        if not self._sharded:
            yield None
            return
        before = self._point
        if known is not None or before is None or before.source is not theta:
            self._point = known or self._gathered(theta)
        try:
            yield self._point
        finally:
            self._point = before

    def _gathered(self, theta: Tensor | None) -> Point:
        """Theta whole, and what else is in shards."""
        before = self._point
        with shielded(), torch.no_grad():
            take_back(self.model)
            here = self.layout.read(self.model) if theta is None else theta.detach()
            everything = here.whole() if isinstance(here, ShardedVector) else here
            if before is not None:
                return Point(everything, before.others, theta)
            own = set(map(id, self.layout.parameters(self.model)))
            others = [p for p in self.model.parameters() if is_shard(p) and id(p) not in own]
            return Point(everything, tuple((other, whole(other)) for other in others), theta)

    def alone(self) -> Evaluator:
        """The same in this process alone, at the point of the moment if the model is in shards."""
        other = copy.copy(self)
        # Of what it warns it shall warn again.
        other._unused = set(self._unused)
        if self._sharded:
            with self.at_point(None if self._point is None else self._point.source) as point:
                assert point is not None
                other._point = point._replace(source=None)
                other.layout = self.layout.in_one_piece
        return other

    def theta(self) -> Tensor:
        """A copy of the parameters, (P,)."""
        point = self._point
        if point is not None and point.source is None and self.layout.sharding is None:
            return point.theta.clone()
        take_back(self.model)
        return self.layout.read(self.model)

    def copied_model(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the model in another dtype; of one in shards a whole one.

        Raises:
            InvalidInput: a large model, see `copies.py`.
            Exception: whatever a model raises that cannot be copied.
        """
        self._refuse_parallel()
        with self.at_point(None if self._point is None else self._point.source) as point:
            if point is None:
                return in_dtype(self.model, dtype)
            named = zip(self.layout.parameters(self.model), self.pieces(point.source), strict=True)
            wholes = {id(parameter): value for parameter, value in (*named, *point.others)}
            return in_dtype(self.model, dtype, lambda: copies_of(self.model, wholes))

    def pieces(self, theta: Tensor | None) -> list[Tensor]:
        """Parameters at theta (P,), or as they are: tensors shaped like them, not to write into."""
        self._refuse_parallel()
        with self.at_point(theta) as point:
            return self._pieces(theta if point is None else point.theta)

    def _refuse_parallel(self) -> None:
        """Raise where all of the model would be evaluated by one process, which has a part of it.

        Raises:
            InvalidInput: the model is tensor parallel.
        """
        if self._parallel:
            raise invalid(
                "model",
                "one that is tensor parallel",
                "one whose parameters stand in one process, or FSDP2",
                "of tensor parallel ones there are values, gradients and the Hessian by"
                " differences of gradients; not outputs and gradients of single samples, which"
                " GaussNewton, GradientCovariance and others are made of",
            )

    def _pieces(self, theta: Tensor | None) -> list[Tensor]:
        parameters = self.layout.parameters(self.model)
        with shielded(), torch.no_grad():
            dtype = self.layout.dtype(self.model)
            if theta is None:
                return [_ordinary(p.detach().to(dtype)) for p in parameters]
            point = _ordinary(theta.detach().to(dtype) if self._low else theta.detach())
            layout = self.layout.in_one_piece
            return [_at_even_offset(part) for part in layout.unflatten(point)]

    @shielded()
    def evaluate(
        self,
        pieces: Sequence[Tensor],
        batch: Batch,
        first: int = 0,
        *,
        apart: bool = False,
        twice: bool = True,
    ) -> tuple[Any, Tensor, Swapped]:
        """Outputs and loss of a batch with their graph, and the model at the pieces.

        Args:
            first: the number of the batch's first sample, by which random numbers are drawn.
            apart: the loss is one of outputs of which none is computed from another.
            twice: the graph will be differentiated twice.

        Raises:
            InvalidInput: the loss is no scalar, or draws random numbers; see the class.
        """
        while True:
            looking = not self._looked
            # What is written into copies tells by its values, and reaches nobody else.
            copied = looking or self._writes
            at = self._at([piece.clone() for piece in pieces] if copied else pieces, twice=twice)
            with at, self.forward_precision():
                begin = place_in_time() if looking else 0
                outputs, loss = self._outputs_and_loss(batch, first, apart)
                self._refuse_changed(at, pieces if copied else None)
            if looking and self._another_way(facts_of(loss, self._named(), begin), twice=twice):
                continue
            # Where a second derivative is refused, the next one that is wanted is to be, too.
            self._looked = not self._reentrant
            self._large.wanted &= self._large.seen or not (looking and twice)
            return outputs, loss, at

    def _refuse_changed(self, at: Swapped, pieces: Sequence[Tensor] | None) -> None:
        """Raise where the forward pass has changed parameters.

        Args:
            pieces: their values before; None where no writing is expected.
        """
        written = [i for i, leaf in enumerate(at.leaves) if leaf._version != at.versions[i]]
        self._writes |= bool(written)
        if pieces is not None:
            pairs = enumerate(zip(at.leaves, pieces, strict=True))
            written = [i for i, (now, before) in pairs if not _same_numbers(now, before)]
        if written:
            name = self.layout.names[written[0]]
            raise InvalidInput(
                f"parameter {name!r}: the forward pass writes into it (max_norm of an Embedding,"
                " clamping of weights?), so that loss and gradient belong to different points;"
                " evaluate the model once by itself, after which max_norm changes nothing, or"
                " take it away (layer.max_norm = None)"
            )

    def _at(self, pieces: Sequence[Tensor], *, twice: bool = True) -> Swapped:
        parameters = self.layout.parameters(self.model)
        places: Places
        if self._overwrite:
            places = Overwritten(parameters, pieces)
        else:
            others = () if self._point is None else self._point.others
            places = Replaced(parameters, pieces, others)
        settings = functools.partial(self.settings, twice=twice)
        return Swapped(self.model, places, settings, low=self._low)

    def _refuse_other_dtypes(self, name: str) -> None:
        """Raise where parameters that hold the values of a point would be in another dtype."""
        dtypes = {p.dtype for p in self.layout.parameters(self.model)}
        if self._low or len(dtypes) > 1:
            given = ", ".join(sorted(map(str, dtypes)))
            allowed = "float32 or float64 alone, where the model uses it beside the attribute"
            hint = "give a copy of the model in float32: copy.deepcopy(model).float()"
            raise invalid(f"parameter {name!r}", given, allowed, hint)

    def _refuse_shards(self, name: str) -> None:
        """Raise where parameters would hold the values of a point, and are shards."""
        if self._sharded:
            allowed = "used by the module's attribute alone, in a model in shards"
            raise invalid(f"parameter {name!r}", "used beside the module's attribute", allowed)

    def _named(self) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, self.layout.parameters(self.model), strict=True))

    def _another_way(self, facts: GraphFacts, *, twice: bool) -> bool:
        """Whether the model is to be evaluated again, in another way; refuse what has no way."""
        if twice:
            refuse_reentrant(facts)
        self._reentrant = facts.reentrant
        refuse_scaled_by_count(facts)
        again = False
        if facts.sparse and not self._sparse:
            self._sparse = again = True
        if facts.reached and not self._overwrite:
            self._refuse_shards(facts.reached[0])
            self._refuse_other_dtypes(facts.reached[0])
            self._overwrite = again = True
        elif self._overwrite:
            refuse_computed_before(facts)
        return again

    def refuse_sharing(self, batch: Batch) -> None:
        """Raise where the model cannot be evaluated at many points at once.

        Raises:
            InvalidInput: it uses a parameter beside the module's attribute or in the backward pass,
                writes into it or needs it at an address of its own.
        """
        reads = self.reads_again(batch)
        theta = self.layout.flatten([piece.detach() for piece in self.pieces(None)])
        begins = (theta, torch.cat([theta[:1], theta])[1:])
        reasons = {
            "uses a parameter beside the module's attribute": self._overwrite,
            "writes into a parameter": self._writes,
            "uses parameters again in the backward pass (activation checkpointing?)": reads.tensors,
            "sees a parameter as complex numbers": not all(map(self._fits(batch), begins)),
        }
        for reason, given in reasons.items():
            if given:
                raise InvalidInput(
                    f"model: it {reason}, which runs in lockstep can't share; let them run one"
                    " after another"
                )

    def reads_again(self, batch: Batch) -> ReadsOf:
        """What a backward pass calls from Python, and whether with parameters."""
        _, loss, at = self.evaluate(self.pieces(None), batch)
        reads = ReadsOf(loss, at.leaves)
        if loss.requires_grad:
            end, starts = get_gradient_edge(loss), [get_gradient_edge(leaf) for leaf in at.leaves]
            one = torch.ones_like(loss)
            with at, reads:
                torch.autograd.grad([end], starts, [one], allow_unused=True)
        return reads

    def _fits(self, batch: Batch) -> Callable[[Tensor], bool]:
        """Whether the model takes views of theta (P,) in its parameters' places."""

        def fits(theta: Tensor) -> bool:
            try:
                with self.settings():
                    self.outputs_and_loss(self.layout.unflatten(theta), batch)
            except RuntimeError as error:
                if "divisible by 2" not in str(error):
                    raise
                return False
            return True

        return fits

    def outputs_and_loss(
        self, leaves: Sequence[Tensor], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the model gives for a batch, and the loss, a scalar; inside `settings`.

        Args:
            leaves: the parameters, which may be tensors of a transform of `torch.func`.

        Raises:
            InvalidInput: the loss is no scalar, or draws random numbers.
        """
        places = Replaced.by_any(self.layout.parameters(self.model), leaves)
        with (
            Swapped(self.model, places, nullcontext, low=self._low),
            self.forward_precision(),
        ):
            return self._outputs_and_loss(batch)

    def loss_through(self, batch: Batch, first: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the model gives for a batch with its own parameters and hooks; inside `settings`.

        Args:
            first: the number of the batch's first sample.
        """
        return self._outputs_and_loss(batch, first)

    def _outputs_and_loss(
        self, batch: Batch, first: int = 0, apart: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        with self.random_numbers(first):
            outputs, loss = self._loss_of_batch(tree_map(self._copy, batch), apart)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise invalid("loss", given, "a scalar tensor", "average over the batch")
        return outputs, (whole_of(loss) if is_shard(loss) else loss).reshape(())

    @contextmanager
    def random_numbers(self, first: int) -> Iterator[None]:
        """None may be drawn, or those of the seed: the same at each evaluation of a chunk."""
        if self.seed is None:
            with no_random_numbers(self.device):
                yield
            return
        seed = self.seed + (0 if self._alike else BETWEEN_SAMPLES * first)
        with begun_at(self.device, seed) as begin:
            with ConstantDraws(self.device) if self._alike else nullcontext():
                yield
            self.drawn.update(begin.moved())

    def draw_alike(self) -> None:
        """From now on all samples have the same random numbers, as far as torch draws them."""
        self._alike = True

    def _copy(self, leaf: Any) -> Any:
        """A part of a batch that the forward pass may write into."""
        if not isinstance(leaf, Tensor):
            return leaf
        copy = raised(leaf.clone()) if self._low else leaf.clone()
        # What a loss differentiates by stays an end of the graph, and the user's tensor out of it.
        return copy.detach().requires_grad_() if leaf.requires_grad and leaf.is_leaf else copy

    @shielded()
    def evaluate_each(
        self, pieces: Sequence[Tensor], parts: Batch, count: int
    ) -> tuple[Tensor, Swapped]:
        """The losses (n,) of batches stacked along the first dimension: see `evaluate`."""
        if self._recomputes is None:
            # Checkpoints cannot be evaluated again for samples that were stacked meanwhile.
            self._recomputes = self.reads_again(entries(parts, 0)).any
        at = self._at([piece.clone() for piece in pieces] if self._writes else pieces)
        each = one_by_one if self._recomputes else mapped
        with at, self.forward_precision():
            losses = each(lambda part: self._outputs_and_loss(part)[1], count, parts)
            self._refuse_changed(at, pieces if self._writes else None)
        return losses, at

    def gradient(
        self, evaluation: Evaluation, *, create_graph: bool = False, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradient of a batch's mean loss: see `Objective.gradient_of`."""
        loss, leaves = evaluation.loss, evaluation.leaves
        refuse_constant(loss)
        if self._reentrant and not create_graph:
            return self.filled(self._gradient_by_backward(evaluation), leaves)
        with evaluation.at:
            parts = derivatives(
                [loss],
                leaves,
                [torch.ones_like(loss)],
                create_graph=create_graph,
                retain_graph=create_graph or retain_graph,
            )
        return self.filled(parts, leaves)

    def _gradient_by_backward(self, evaluation: Evaluation) -> list[Tensor | None]:
        """By `backward()`, for checkpoints that know no other way; gradients stay as they were."""
        own = [*self.model.parameters(), *evaluation.leaves]
        held = [(parameter, parameter.grad) for parameter in own]
        try:
            for parameter, _ in held:
                parameter.grad = None
            with evaluation.at:
                evaluation.loss.backward()
            return [leaf.grad for leaf in evaluation.leaves]
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient

    def filled(
        self, parts: Sequence[Tensor | None], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients with zeros for those of parameters that the loss does not use.

        Raises:
            InvalidInput: one is not dense.

        Warns:
            UserWarning: once for each that is not used.
        """
        for name, part in zip(self.layout.names, parts, strict=True):
            if part is None and name not in self._unused:
                self._unused.add(name)
                warnings.warn(
                    f"the loss does not use parameter {name!r}, or only where no graph is recorded"
                    " (detach, no_grad, a checkpoint with use_reentrant=True whose inputs need no"
                    " gradient): its part of every gradient and product is zero",
                    stacklevel=level_of_caller(),
                )
            if part is not None and part.layout != torch.strided:
                allowed = "a dense gradient"
                raise invalid(f"parameter {name!r}", str(part.layout), allowed, "sparse=False")
        return tuple(
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(parts, leaves, strict=True)
        )


class LossOfBatch(nn.Module):
    """Outputs and loss as a function of one batch, so that parameters can be swapped under it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        # Kept out of the module tree: a loss with buffers of its own is a constant.
        self._loss = [loss]

    def forward(self, batch: Batch, apart: bool = False) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs that depend on the parameters, and the loss.

        Args:
            apart: of outputs of which none is computed from another; of them, not of each other, a
                loss can take derivatives then.
        """
        loss = self._loss[0]
        if isinstance(loss, ComputeLoss):
            output, target = loss(self.model, batch), None
        else:
            output, target = self._output_and_target(batch)
        if loss is None or isinstance(loss, ComputeLoss):
            # The outputs have been read already.
            value = _own_loss(output)
        elif apart:
            output = separated(output, self._depends)
            value = _of_separated(loss, output, target)
        else:
            value = loss(output, target)
        outputs = (z for z in tensors_of(output) if self._depends(z) and z is not value)
        return tuple(outputs), value

    def _output_and_target(self, batch: Batch) -> tuple[Any, Any]:
        loss = self._loss[0]
        if not isinstance(batch, Mapping):
            *inputs, target = batch if loss is not None else (*batch, None)
            return self.model(*inputs), target
        if loss is not None and is_torch_loss(loss):
            target = target_name(batch)
            inputs = {name: value for name, value in batch.items() if name != target}
            return self.model(**inputs), batch[target]
        return self.model(**batch), batch

    def _depends(self, output: Tensor) -> bool:
        """Whether it may depend on the parameters: an input that is given back does not."""
        if not output.requires_grad or not output.is_leaf:
            return output.requires_grad
        return any(output is parameter for parameter in self.model.parameters())


def _of_separated(loss: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    try:
        return loss(output, target)
    except RuntimeError as error:
        if "appears to not have been used in the graph" not in str(error):
            raise
        raise InvalidInput(
            "GaussNewton: the loss takes derivatives of an output by another one; take them in the"
            " model and let it return them, or take the Hessian"
        ) from error


def _own_loss(output: Any) -> Tensor:
    """The loss that is returned: a scalar, an entry or attribute `loss`, the first of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, (tuple, list)) and output and getattr(output[0], "ndim", 1) == 0:
        found = output[0]
    if not isinstance(found, Tensor):
        allowed = "a scalar or an object with .loss, alone or first in a tuple"
        raise invalid("model output", type(output).__name__, allowed)
    return found


def refuse_constant(loss: Tensor) -> None:
    """Raise where a loss cannot be differentiated.

    Raises:
        InvalidInput: it does not depend on any parameter.
    """
    if not loss.requires_grad:
        raise InvalidInput(
            "loss: it does not depend on any parameter; was an output detached, or computed"
            " under no_grad?"
        )


def _ordinary(tensor: Tensor) -> Tensor:
    """One that autograd takes; what was made in inference mode it does not."""
    return tensor.clone() if tensor.is_inference() else tensor


def _at_even_offset(part: Tensor) -> Tensor:
    """A part of theta that begins where one of complex numbers may, as a parameter does."""
    return part.clone() if part.storage_offset() % 2 and part.numel() % 2 == 0 else part


def _same_numbers(first: Tensor, second: Tensor) -> bool:
    first, second = first.detach(), second.detach()
    return torch.equal(first, second) or bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )


def mapped(function: Callable[..., Tensor], count: int, *stacked: Batch) -> Tensor:
    """A function of tensors, applied to each of `count` entries of stacked ones; stacked (count,).

    At once by `torch.vmap`; one by one where a layer does not have it.
    """
    leaves, structure = tree_flatten(stacked)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(*tensors: Tensor) -> Tensor:
        parts = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            parts[i] = tensor
        return function(*tree_unflatten(parts, structure))

    if any(isinstance(leaf, PerSample) for leaf in leaves):
        return one_by_one(function, count, *stacked)
    try:
        with warnings.catch_warnings():
            # Of operations that are slow so: told for each, and nothing that a user can mend.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.vmap(of_tensors)(*(leaves[i] for i in places))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return one_by_one(function, count, *stacked)


def one_by_one(function: Callable[..., Tensor], count: int, *stacked: Batch) -> Tensor:
    """The same as `mapped`, one entry after another."""
    return torch.stack([function(*(entries(s, i) for s in stacked)) for i in range(count)])


def entries(batch: Batch, chosen: int | Tensor) -> Batch:
    """Some entries of batches that are stacked along the first dimension."""

    def of_list(values: PerSample) -> Any:
        if isinstance(chosen, int):
            return values[chosen]
        some = torch.arange(len(values), device="cpu")[chosen.cpu()].tolist()
        return PerSample(values[i] for i in some)

    return tree_map(mapped_leaves(lambda tensor: tensor[chosen], of_list), batch)


def in_groups(batch: Batch, size: int) -> Batch:
    """A batch as stacked batches of so many samples each."""

    def of_list(values: PerSample) -> PerSample:
        starts = range(0, len(values), size)
        return PerSample(PerSample(values[i : i + size]) for i in starts)

    unflatten = mapped_leaves(lambda tensor: tensor.unflatten(0, (-1, size)), of_list)
    return tree_map(unflatten, batch)
