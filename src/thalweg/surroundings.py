"""What the user's code has set around a call neither changes its numbers nor is blamed for them.

A call may come from inside of `torch.autocast`, `inference_mode`, `no_grad`, anomaly detection, a
cache of parametrizations or hooks on saved tensors, and after settings that lower the precision of
matrix products: on NVIDIA GPUs convolutions of float32 are in TF32 unless torch is told otherwise,
with 10 bits of mantissa, and matrices too after `torch.set_float32_matmul_precision("high")`; after
"medium" some CPUs multiply in bfloat16. Products with a Hessian would be off by a thousandth, and
bases no longer orthonormal. All of that is put aside while Thalweg computes, and stands again
afterwards.

Not put aside, since a model may count on it: the default dtype and device, deterministic
algorithms, and modes of one's own (`TorchFunctionMode`, `TorchDispatchMode`).

Example:
    >>> import torch
    >>> with torch.autocast("cpu", torch.bfloat16), shielded():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

FULL, INHERITED = "ieee", "none"
LOWERED = ("tf32", "bf16")
WITH_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions, matrix products and recurrent layers in the dtype of their tensors.

    Two may be nested. Source: "CUDA semantics" in the documentation of torch, on TF32.
    """
    lowered = _lowered()
    for place, _ in lowered:
        place.fp32_precision = FULL
    try:
        with ExitStack() as stack:
            for kind in _autocast():
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for place, before in lowered:
            # What was told to all operations at once is to stay theirs.
            place.fp32_precision = INHERITED
            if place.fp32_precision != before:
                place.fp32_precision = before


def in_full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that computes within `full_precision`; 5 us where nothing is lowered."""

    @functools.wraps(function)
    def precisely(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not (_autocast() or _lowered()):
            return function(*args, **kwargs)
        with full_precision():
            return function(*args, **kwargs)

    return precisely


def _autocast() -> list[str]:
    """The kinds of device for which autocast is in force."""
    return [kind for kind in WITH_AUTOCAST if torch.is_autocast_enabled(kind)]


def _lowered() -> list[tuple[Any, str]]:
    """The operations whose precision is lowered, and to what."""
    return [(place, p) for place in _places() if (p := place.fp32_precision) in LOWERED]


def _places() -> Iterator[Any]:
    """Where torch holds the precision of an operation on a device."""
    backends: Any = torch.backends  # the type stubs lack the settings by operation
    yield from (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    if torch.cuda.is_initialized():
        yield from (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)


@contextmanager
def shielded() -> Iterator[None]:
    """Compute with autograd on and in the dtype of the tensors, whatever surrounds the call.

    Autocast, inference mode, `no_grad`, anomaly detection and `torch.compile` are off, hooks on
    saved tensors and a cache of parametrizations are not seen, and matrix products of float32 are
    not lowered. Two may be nested. Where nothing of it is in force it costs about 15 us. Also a
    decorator.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        if torch.is_inference_mode_enabled():
            enter(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            enter(torch.enable_grad())
        if torch.is_anomaly_enabled():
            enter(torch.autograd.set_detect_anomaly(False))
        if _hooks_on_saved_tensors():
            enter(saved_tensors_hooks(_same, _same))
        if parametrize._cache_enabled:
            enter(_no_cached_parametrizations())
        if _has_compiled():
            enter(torch.compiler.set_stance("force_eager"))
        enter(full_precision())
        yield


def _hooks_on_saved_tensors() -> bool:
    internals: Any = torch._C
    return internals._autograd._top_saved_tensors_default_hooks(True) is not None


def _has_compiled() -> bool:
    """Whether anything may have been compiled; to import torch's compiler takes seconds."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and bool(getattr(compiler, "cached_backends", True))


@contextmanager
def _no_cached_parametrizations() -> Iterator[None]:
    """Parametrized weights are computed anew: a cached one is that of the user's parameters."""
    module: Any = parametrize
    held = module._cache_enabled, module._cache
    module._cache_enabled, module._cache = 0, {}
    try:
        yield
    finally:
        module._cache_enabled, module._cache = held


@contextmanager
def one_path() -> Iterator[None]:
    """Attention by the operations that can be differentiated twice, with or without a graph.

    Fused kernels have no second derivative, and the fast path of `nn.TransformerEncoder`, which is
    taken where no graph is recorded, leaves padded positions at zero.
    """
    cuda: Any = torch.backends.cuda
    fused = [
        enable
        for is_enabled, enable in (
            (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
            (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
            (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        )
        if is_enabled()
    ]
    math, fast = cuda.math_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    for enable in fused:
        enable(False)
    cuda.enable_math_sdp(True)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        for enable in fused:
            enable(True)
        cuda.enable_math_sdp(math)
        torch.backends.mha.set_fastpath_enabled(fast)


def _same(tensor: Any) -> Any:
    return tensor
