"""A model and its loss on one batch, with the graph from the parameters to outputs and loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from thalweg.errors import InvalidInput, invalid, level_of_caller
from thalweg.loss.batches import PerSample, mapped_leaves
from thalweg.loss.chunk_multiplier import derivatives
from thalweg.loss.guards.determinism import (
    mode_dependent_layers,
    no_random_numbers,
    refuse_unfit_layers,
)
from thalweg.loss.guards.dtypes import InFloat32, is_low, raised
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
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.outputs import separated, tensors_of
from thalweg.loss.samples import Batch
from thalweg.loss.swapped import Overwritten, Places, Replaced, Swapped
from thalweg.loss.weighting import is_torch_loss, target_name
from thalweg.surroundings import one_path, shielded


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


class Evaluator:
    """A model and its loss on single batches, at any parameters, without a trace in the model.

    Neither parameters, buffers and other attributes of the model nor the batch are changed, also
    where the forward pass writes into them: it works on copies, and attributes are put back.

    Found at the first evaluation, from the loss's graph, which costs 1 to 2 us for each operation:
    whether the model reaches a parameter by another road than the module's attribute, a closure or
    a list (then its own parameters hold the point's values while a pass lasts), and whether
    gradients would be sparse (they are made dense).

    Args:
        model, loss, mode, forward_dtype: as for `Objective`.
        layout: which of the model's parameters make up theta.

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
        mode: str | None,
        forward_dtype: torch.dtype | None,
    ) -> None:
        if mode not in (None, "eval"):
            raise invalid("mode", mode, "None or 'eval'")
        if forward_dtype not in (None, torch.bfloat16, torch.float16):
            raise invalid("forward_dtype", forward_dtype, "None, torch.bfloat16 or torch.float16")
        self.model = model
        self.loss = loss
        self.layout = layout
        self.mode = mode
        self.forward_dtype = forward_dtype
        self._loss_of_batch = LossOfBatch(model, loss)
        self._unused: set[str] = set()
        self._mode_dependent = mode_dependent_layers(model)
        self._recurrent = has_recurrent_layers(model)
        self._with_sparse_gradients = layers_with_sparse_gradients(model)
        self._low = is_low(model.parameters())
        # What the first evaluation finds. The parameters of a TorchScript module cannot be swapped.
        self._looked = False
        self._overwrite = any(isinstance(m, torch.jit.ScriptModule) for m in model.modules())
        self._sparse = self._writes = False
        self._recomputes: bool | None = None
        refuse_unfit_layers(self._mode_dependent, mode)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.model.parameters()).device

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What every pass needs, forward and backward: see `shielded`, and the mode as asked for.

        Layers that can be differentiated twice, and dense gradients.
        """
        # At every evaluation: a model built in evaluation mode is switched when it is trained.
        refuse_unfit_layers(self._mode_dependent, self.mode)
        training = [m for m in self.model.modules() if m.training] if self.mode == "eval" else []
        for module in training:
            module.training = False
        sparse = [layer for layer in self._with_sparse_gradients if layer.sparse]
        for layer in sparse:
            layer.sparse = False
        try:
            with ExitStack() as stack:
                stack.enter_context(shielded())
                stack.enter_context(one_path())
                if self._recurrent:
                    stack.enter_context(twice_differentiable(self._recurrent))
                if self._sparse:
                    stack.enter_context(Dense())
                if self._low:
                    stack.enter_context(InFloat32())
                yield
        finally:
            for layer in sparse:
                layer.sparse = True
            for module in training:
                module.training = True

    @contextmanager
    def _forward_precision(self) -> Iterator[None]:
        """Autocast, where the forward pass alone is to be in another dtype."""
        if self.forward_dtype is None:
            yield
            return
        # A copy that autocast keeps would be that of a parameter at another point.
        with torch.autocast(
            self.device.type, self.forward_dtype, cache_enabled=not self._overwrite
        ):
            yield

    def pieces(self, theta: Tensor | None) -> list[Tensor]:
        """Parameters at theta (P,), or as they are: tensors shaped like them, not to write into."""
        parameters = self.layout.parameters(self.model)
        with shielded(), torch.no_grad():
            dtype = self.layout.dtype(self.model)
            if theta is None:
                return [_ordinary(p.detach().to(dtype)) for p in parameters]
            whole = _ordinary(theta.detach().to(dtype) if self._low else theta.detach())
            return [_at_even_offset(part) for part in self.layout.unflatten(whole)]

    @shielded()
    def evaluate(self, pieces: Sequence[Tensor], batch: Batch) -> tuple[Any, Tensor, Swapped]:
        """Outputs and loss of a batch with their graph, and the model at the pieces.

        Raises:
            InvalidInput: the loss is no scalar, or draws random numbers; see the class.
        """
        while True:
            first = not self._looked
            # What is written into copies tells by its values, and reaches nobody else.
            apart = first or self._writes
            at = self._at([piece.clone() for piece in pieces] if apart else pieces)
            with at, self._forward_precision():
                begin = place_in_time() if first else 0
                outputs, loss = self._outputs_and_loss(batch)
                self._refuse_changed(at, pieces if apart else None)
            if first and self._another_way(facts_of(loss, self._named(), begin)):
                continue
            self._looked = True
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

    def _at(self, pieces: Sequence[Tensor]) -> Swapped:
        parameters = self.layout.parameters(self.model)
        places: Places
        if self._overwrite:
            places = Overwritten(parameters, pieces)
        else:
            places = Replaced(parameters, pieces)
        return Swapped(self.model, places, self.settings, low=self._low)

    def _refuse_other_dtypes(self, name: str) -> None:
        """Raise where parameters that hold the values of a point would be in another dtype."""
        dtypes = {p.dtype for p in self.layout.parameters(self.model)}
        if self._low or len(dtypes) > 1:
            given = ", ".join(sorted(map(str, dtypes)))
            allowed = "float32 or float64 alone, where the model uses it beside the attribute"
            hint = "give a copy of the model in float32: copy.deepcopy(model).float()"
            raise invalid(f"parameter {name!r}", given, allowed, hint)

    def _named(self) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, self.layout.parameters(self.model), strict=True))

    def _another_way(self, facts: GraphFacts) -> bool:
        """Whether the model is to be evaluated again, in another way; refuse what has no way."""
        refuse_reentrant(facts)
        refuse_scaled_by_count(facts)
        again = False
        if facts.sparse and not self._sparse:
            self._sparse = again = True
        if facts.reached and not self._overwrite:
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
        reads = self._reads_again(batch)
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

    def _reads_again(self, batch: Batch) -> ReadsOf:
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
            self._forward_precision(),
        ):
            return self._outputs_and_loss(batch)

    def _outputs_and_loss(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        with no_random_numbers(self.device):
            outputs, loss = self._loss_of_batch(tree_map(self._copy, batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise invalid("loss", given, "a scalar tensor", "average over the batch")
        return outputs, loss.reshape(())

    def _copy(self, leaf: Any) -> Any:
        """A part of a batch that the forward pass may write into."""
        if not isinstance(leaf, Tensor):
            return leaf
        return raised(leaf.clone()) if self._low else leaf.clone()

    @shielded()
    def evaluate_each(
        self, pieces: Sequence[Tensor], parts: Batch, count: int
    ) -> tuple[Tensor, Swapped]:
        """The losses (n,) of batches stacked along the first dimension: see `evaluate`."""
        if self._recomputes is None:
            # Checkpoints cannot be evaluated again for samples that were stacked meanwhile.
            self._recomputes = self._reads_again(entries(parts, 0)).any
        at = self._at([piece.clone() for piece in pieces] if self._writes else pieces)
        each = one_by_one if self._recomputes else mapped
        with at, self._forward_precision():
            losses = each(lambda part: self._outputs_and_loss(part)[1], count, parts)
            self._refuse_changed(at, pieces if self._writes else None)
        return losses, at

    def gradient(
        self, evaluation: Evaluation, *, create_graph: bool = False, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradient of a batch's mean loss: see `Objective.gradient_of`."""
        loss, leaves = evaluation.loss, evaluation.leaves
        refuse_constant(loss)
        with evaluation.at:
            parts = derivatives(
                [loss],
                leaves,
                [torch.ones_like(loss)],
                create_graph=create_graph,
                retain_graph=create_graph or retain_graph,
            )
        return self._filled(parts, leaves)

    def _filled(
        self, parts: Sequence[Tensor | None], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
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

    def forward(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs that depend on the parameters, and the loss."""
        output, loss = self._output_and_loss(batch)
        outputs = (z for z in tensors_of(output) if z.requires_grad and z is not loss)
        return tuple(outputs), loss

    def _output_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        loss = self._loss[0]
        if not isinstance(batch, Mapping):
            *inputs, target = batch if loss is not None else (*batch, None)
            output = self._separated(self.model(*inputs))
            return output, _own_loss(output) if loss is None else loss(output, target)
        if loss is not None and is_torch_loss(loss):
            target = target_name(batch)
            inputs = {name: value for name, value in batch.items() if name != target}
            output = self._separated(self.model(**inputs))
            return output, loss(output, batch[target])
        output = self._separated(self.model(**batch))
        return output, _own_loss(output) if loss is None else loss(output, batch)

    def _separated(self, output: Any) -> Any:
        """What the loss gets; a model that returns its own loss has read its outputs already."""
        return output if self._loss[0] is None else separated(output)


def _own_loss(output: Any) -> Tensor:
    """The loss that a model returns: a scalar, or an entry or attribute `loss`."""
    found = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(found, Tensor):
        raise invalid("model output", type(output).__name__, "a scalar or an object with .loss")
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
