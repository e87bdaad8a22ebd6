"""One model, loss and data at R parameter vectors at once: losses, gradients, Hessian products.

Small models keep a processor waiting for the next instruction. R runs of one model have the same
instructions, so `vmap` makes them one computation: every matrix gets a first dimension of R, and
overheads are paid once. Runs are independent: row r of every result depends on row r of thetas.

Example:
    >>> import torch
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> runs = LockstepObjective(Objective(model, torch.nn.MSELoss(), data))
    >>> thetas = torch.randn(5, 8)
    >>> losses, gradients = runs.values_and_gradients(thetas)
    >>> losses.shape, gradients.shape
    (torch.Size([5]), torch.Size([5, 8]))
    >>> runs.hessian_products(thetas, torch.eye(8).expand(5, 8, 8)).shape
    torch.Size([5, 8, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap

from thalweg.errors import invalid
from thalweg.loss.chunk_multiplier import ChunkMultiplier, pull_back
from thalweg.loss.evaluation import entries, in_groups, mapped, refuse_constant
from thalweg.loss.guards.memory import within_memory
from thalweg.loss.objective import Objective
from thalweg.loss.replay import Replay
from thalweg.loss.samples import Batch, refuse_unfit_indices
from thalweg.sharding import refuse_sharding

FEW_SAMPLES = 2


@dataclass(frozen=True)
class Chunk:
    """Some samples, the same for all runs or each run's own.

    Attributes:
        batch: tensors of n samples, or stacked (R, n, ...).
        own: whether they are stacked.
        samples: how many all runs together evaluate, R n.
        fraction: the chunk's weight in the mean; (R,) where it differs between the runs.
    """

    batch: Batch
    own: bool
    samples: int
    fraction: float | Tensor

    def weighted(self, values: Tensor) -> Tensor:
        """Values (R, ...) of the chunk times its fraction."""
        fraction = self.fraction
        if isinstance(fraction, Tensor):
            return values * fraction.to(values).reshape(-1, *(1,) * (values.dim() - 1))
        return values if fraction == 1 else values * fraction


class LockstepObjective:
    """The losses of R runs of one model, each a function of its own row of thetas (R, P).

    Args:
        objective: model, loss, data. The model's own parameters are not used; its buffers are those
            of every run. Its `chunk_size` bounds the samples of all runs together.
        vectorize_up_to: samples of all runs in the largest chunk whose block of products is one
            pass, as for `Objective`, 0 for none; None measures.
        replay: record what is computed once for each number of samples, and replay it; on a CUDA
            device as a CUDA graph. A recording takes up to a second: for long runs of small models.

    Attributes:
        multiplier: how blocks are multiplied: a `ChunkMultiplier`.

    Raises:
        InvalidInput: as for `Objective`; an objective with a seed, or by differences; a model
            with activation checkpointing, one that has a parameter at hand beside the module's
            attribute, or that writes into its parameters or sees them as complex numbers (looked
            for once, on two samples); thetas that are not (R, P); indices that are neither int64
            (n,) nor (R, n); `replay` with a model that looks at values.

    Results are in units of the loss, over theta for derivatives; on the device and in the dtype of
    thetas. NaN and infinite values stay in their run's row; nobody looks for them here, since that
    would wait for the device. Where a layer does not have `vmap`, runs are evaluated one by one.

    Source: model ensembling, as in the documentation of `torch.func.stack_module_state`. Example:
    see the module.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        vectorize_up_to: int | None = None,
        replay: bool = False,
    ) -> None:
        refuse_sharding(objective, "LockstepObjective")
        if objective.evaluator.seed is not None:
            hint = "let random losses run one after another, each with an Objective of its own"
            raise invalid("seed", objective.evaluator.seed, "None for runs in lockstep", hint)
        if not objective.choice.is_exact:
            hint = "let runs by differences go one after another, each with an Objective of its own"
            raise invalid("product", "difference", "exact products for runs in lockstep", hint)
        self.objective = objective
        self.multiplier = ChunkMultiplier(vectorize_up_to)
        self._replay = Replay() if replay else None
        self._looked = False

    @property
    def num_parameters(self) -> int:
        """P, the length of one run's theta."""
        return self.objective.num_parameters

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return self.objective.num_samples

    def values_and_gradients(
        self, thetas: Tensor, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean loss (R,) of each run, and its gradient (R, P).

        Args:
            thetas: (R, P), a run in each row.
            samples: indices of the samples to average over: int64 (n,) for all runs, (R, n) for
                each run its own (a mini-batch); None for all samples.
        """
        self._refuse_shape(thetas)
        self._look()
        weight = self._prepared(thetas, samples)

        def own() -> tuple[Tensor, Tensor]:
            return within_memory(
                self.objective, lambda: self._values_and_gradients(thetas, samples, weight)
            )

        values, gradients = self.objective.reduction.sums(own, thetas[:, 0])
        return values, gradients

    def hessian_products(
        self, thetas: Tensor, rows: Tensor, samples: Tensor | None = None
    ) -> Tensor:
        """Each run's Hessian times its own block of vectors, as rows (R, k, P).

        Args:
            thetas: (R, P).
            rows: (R, k, P), k vectors for each run.
            samples: as for `values_and_gradients`.
        """
        self._refuse_shape(thetas)
        if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != tuple(thetas.shape):
            allowed = f"(R, k, P) = ({thetas.shape[0]}, k, {self.num_parameters})"
            raise invalid("rows", tuple(rows.shape), allowed)
        self._look()
        weight = self._prepared(thetas, samples)

        def own() -> tuple[Tensor]:
            return (
                within_memory(
                    self.objective, lambda: self._products(thetas, rows, samples, weight)
                ),
            )

        return self.objective.reduction.sums(own, rows)[0]

    def state_dict(self) -> dict[str, Any]:
        """The chunk size and the way to multiply, as far as they were found while running."""
        return {"multiplier": self.multiplier.state_dict(), "chunk_size": self.objective.chunk_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        # Until 0.1 it was called "products".
        former = state.get("products")
        self.multiplier.load_state_dict(state["multiplier"] if former is None else former)
        self.objective.chunk_size = state["chunk_size"]

    def _values_and_gradients(
        self, thetas: Tensor, samples: Tensor | None, weight: float
    ) -> tuple[Tensor, Tensor]:
        values, gradients = thetas.new_zeros(len(thetas)), torch.zeros_like(thetas)
        with self.objective.evaluator.settings():
            for chunk in self._chunks(samples, len(thetas), weight):
                losses, gradient = self._losses_and_gradients(thetas, chunk)
                values += chunk.weighted(losses)
                gradients += chunk.weighted(gradient)
        return values, gradients

    def _losses_and_gradients(self, thetas: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """One chunk's losses (R,) and gradients (R, P)."""
        if self._replay is not None:
            gradients, losses = self._over_runs(grad_and_value(self._loss), chunk, thetas)
            return losses, gradients
        leaf = thetas.detach().requires_grad_()
        losses = self._losses(leaf, chunk)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradients

    def _products(
        self, thetas: Tensor, rows: Tensor, samples: Tensor | None, weight: float
    ) -> Tensor:
        result: Tensor | None = None
        with self.objective.evaluator.settings():
            for chunk in self._chunks(samples, len(thetas), weight):
                part = self._chunk_products(thetas, rows, chunk)
                result = part if result is None else result.add_(part)
        return torch.zeros_like(rows) if result is None else result

    def _chunk_products(self, thetas: Tensor, rows: Tensor, chunk: Chunk) -> Tensor:
        """One chunk's part of the products (R, k, P)."""

        def one_by_one() -> Tensor:
            leaf = thetas.detach().requires_grad_()
            losses = self._losses(leaf, chunk)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
            # The sum's Hessian is block-diagonal: one pass multiplies a vector of every run.
            parts = [
                pull_back([gradient], [leaf], [vectors], vectorized=False)[0]
                for vectors in rows.unbind(1)
            ]
            return torch.stack(parts, dim=1)

        def vectorized() -> Tensor:
            # Runs outside and vectors inside, so that a matrix of weights multiplies the k n rows
            # of its run. With vectors outside, which a kept graph imposes, every vector gets a
            # copy of the weights: 3 to 6 times as slow on an MLP 784-200-200-10.
            return self._over_runs(self._block_products, chunk, thetas, rows)

        product = self.multiplier.faster(chunk.samples, rows.shape[1], one_by_one, vectorized)
        return chunk.weighted(product)

    def _over_runs(self, function: Callable[..., Any], chunk: Chunk, *stacked: Tensor) -> Any:
        """A function of one run's tensors and a batch, for all runs at once."""
        dims = (*(0 for _ in stacked), 0 if chunk.own else None)
        call = vmap(function, in_dims=dims)
        if self._replay is None:
            return call(*stacked, chunk.batch)
        return self._replay(f"{function.__qualname__} {dims}", call, *stacked, chunk.batch)

    def _block_products(self, theta: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        """One run's Hessian on a batch times its rows (k, P)."""
        pull = vjp(lambda t: grad(self._loss)(t, batch), theta)[1]
        return vmap(pull)(rows)[0]

    def _losses(self, thetas: Tensor, chunk: Chunk) -> Tensor:
        """The losses (R,) on a chunk, with their graph."""
        if chunk.own:
            losses = mapped(self._value, len(thetas), thetas, chunk.batch)
        else:
            losses = mapped(lambda theta: self._value(theta, chunk.batch), len(thetas), thetas)
        # Not inside of vmap, where no tensor says that it requires a gradient.
        refuse_constant(losses)
        return losses

    def _loss(self, theta: Tensor, batch: Batch) -> Tensor:
        """One run's mean loss on a batch, a function of theta (P,), under `torch.func.grad`."""
        loss = self._value(theta, batch)
        refuse_constant(loss)
        return loss

    def _value(self, theta: Tensor, batch: Batch) -> Tensor:
        """The same, constant or not."""
        parts = self.objective.layout.unflatten(theta)
        return self.objective.evaluator.outputs_and_loss(parts, batch)[1]

    def _prepared(self, thetas: Tensor, samples: Tensor | None) -> float:
        """The weight of samples that all runs share, see `Objective.prepared`."""
        if samples is not None and samples.dim() == 2:
            return 1.0
        return self.objective.prepared(thetas, samples, self._size(len(thetas)))

    def _size(self, runs: int) -> int | None:
        """The most samples of a run in a chunk."""
        size = self.objective.chunk_size
        return None if size is None else max(1, size // runs)

    def _chunks(self, samples: Tensor | None, runs: int, weight: float) -> Iterator[Chunk]:
        size = self._size(runs)
        if samples is not None and samples.dim() == 2:
            yield from self._own_chunks(samples, runs, size)
            return
        for batch, count, fraction, _ in self.objective.chunks(samples, size, weight=weight):
            yield Chunk(batch, False, runs * count, fraction)

    def _own_chunks(self, samples: Tensor, runs: int, size: int | None) -> Iterator[Chunk]:
        """Chunks of samples (R, n), a row for each run."""
        if len(samples) != runs:
            raise invalid("samples", tuple(samples.shape), f"(n,) or (R, n) with R = {runs}")
        if self.num_samples != len(self.objective.samples):
            allowed = "None or (n,), where the data are divided among processes"
            raise invalid("samples", tuple(samples.shape), allowed)
        if samples.device.type == "cpu":
            # Indices on a device are the caller's: to look at them is to wait for it.
            refuse_unfit_indices(samples.flatten(), self.num_samples)
        self.objective.require_mean()
        pieces = samples.split(size or samples.shape[1], dim=1)
        totals = None
        weigh = self.objective.batch_weight
        if weigh is not None and len(pieces) > 1:
            totals = sum(_weights(weigh, self._stacked(piece), runs) for piece in pieces)
        for piece in pieces:
            batch, fraction = self._stacked(piece), piece.shape[1] / samples.shape[1]
            if weigh is not None and totals is not None:
                fraction = _weights(weigh, batch, runs) / totals
            yield Chunk(batch, True, piece.numel(), fraction)

    def _stacked(self, samples: Tensor) -> Batch:
        """The samples of indices (R, n) as tensors (R, n, ...)."""
        batches = [b for b, _ in self.objective.samples.chunks(samples.flatten(), None)]
        if len(batches) > 1:
            raise invalid(
                "data",
                "batches that cannot be joined, such as texts padded to different lengths",
                "tensors or a Dataset, where each run has its own samples",
            )
        return in_groups(batches[0], samples.shape[1])

    def _look(self) -> None:
        """Refuse, once and by a few samples, a model that runs cannot share."""
        if not self._looked:
            # Those of this process, whatever they weigh.
            with self.objective.reduction.together():
                batch, _ = next(self.objective.samples.chunks(None, FEW_SAMPLES))
                within_memory(
                    self.objective, lambda: self.objective.evaluator.refuse_sharing(batch)
                )
            self._looked = True

    def _refuse_shape(self, thetas: Tensor) -> None:
        if thetas.dim() != 2 or thetas.shape[1] != self.num_parameters or not len(thetas):
            allowed = f"(R, P), R >= 1, with P = {self.num_parameters}"
            raise invalid("thetas", tuple(thetas.shape), allowed)
        if thetas.device != self.objective.device:
            device = self.objective.device
            raise invalid("thetas", f"on {thetas.device}", f"on {device}, like the model")


def _weights(weigh: Callable[[Batch], Tensor | float], batch: Batch, runs: int) -> Tensor:
    """The batch weights (R,) of stacked batches, in float64 on the CPU."""
    each = [float(weigh(entries(batch, run))) for run in range(runs)]
    weights = torch.tensor(each, dtype=torch.float64, device="cpu")
    if not bool((weights > 0).all()):
        raise invalid(
            "batch_weight",
            float(weights.min()),
            "a positive weight of every run's samples in a chunk",
            "raise chunk_size",
        )
    return weights
