"""Named blocks of parameters, and an operator restricted to one of them.

A block is a set of parameters told by their names: shell patterns for each block, of which the
first that matches decides. `TRANSFORMER_BLOCKS` knows the usual names of the parts of Transformers.

Source of the blocks: Wang et al. 2025, "The sharpness disparity principle in Transformers" (arXiv
2502.19002); query and key are one block, value and output another.

Example:
    >>> names = ["wte.weight", "h.0.attn.q_attn.weight", "h.0.attn.c_proj.weight", "ln_f.weight"]
    >>> list(blocks_of(names))
    ['embedding', 'query_key', 'value_output', 'norm']
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.layout import ParameterLayout
from thalweg.operators.symmetric import (
    OperatorAround,
    SymmetricOperator,
    product_with_error,
    rows_of,
)
from thalweg.sharding import Sharding, plain, sharding_of

# In the order in which they are tried: what is norm or position by its name is that everywhere.
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "norm": ("*norm*", "*ln_*", "*.ln?.*"),
    "position": ("*position*", "*wpe*", "*pos_emb*", "*relative_attention_bias*"),
    "head": (
        "head.*",
        "*.head.*",
        "*lm_head*",
        "*embed_out*",
        "*pooler*",
        "*classifier*",
        "cls.*",
        "*.cls.*",
        "score.*",
        "*.score.*",
        "*qa_outputs*",
        # The last layer of BERT's head, not the decoder of a sequence-to-sequence model.
        "decoder.weight",
        "decoder.bias",
        "*.decoder.weight",
        "*.decoder.bias",
    ),
    "embedding": ("*embed*", "*wte*", "*tok_emb*", "shared.*", "*.shared.*"),
    "query_key": (
        "*.query.*",
        "*.key.*",
        "*q_proj*",
        "*k_proj*",
        "*q_attn*",
        "*k_attn*",
        "*q_lin*",
        "*k_lin*",
        "*attention.q.*",
        "*attention.k.*",
        "*.bias_k",
    ),
    "value_output": (
        "*.value.*",
        # Not `qkv_proj`, which is all three in one.
        "v_proj*",
        "*[!k]v_proj*",
        "*v_attn*",
        "*v_lin*",
        "*attention.v.*",
        "*.bias_v",
        "*attention.output.*",
        "*attention.dense*",
        "*attn.dense*",
        "*attention.o.*",
        "*attn.c_proj*",
        "*attn.proj.*",
        "*o_proj*",
        "*out_proj*",
        "*out_lin*",
    ),
    "feed_forward": (
        "*feed_forward*",
        "*mlp*",
        "*ffn*",
        "*.fc?.*",
        "*.linear1.*",
        "*.linear2.*",
        "*densereludense*",
        "*intermediate*",
        "*.output.*",
    ),
}

TRANSFORMER_BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(_PATTERNS)
"""Patterns of the blocks of a Transformer, after the names in common libraries.

Norms, position embeddings, output head (BERT's pooler and what stands on it too), token embedding,
query and key, value and attention's output, feed-forward. The names are those of torch's
`nn.Transformer` and of GPT-2, LLaMA, BERT, T5 and their relatives in transformers. A head tied to
the embedding is the embedding. Query, key and value in one map (`c_attn`, `in_proj_weight`,
`qkv_proj`, `query_key_value`) belong to several blocks, and so to none.
"""

_ATTENTION = ("*attn*", "*attention*", "*in_proj_*", "*qkv*")

MODEL_BLOCKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "norm": (*_PATTERNS["norm"], "*bn?.*", "*downsample.1.*", "*shortcut.1.*"),
        "head": (*_PATTERNS["head"], "heads.*", "*.heads.*", "fc.*", "*.fc.*"),
        "embedding": (
            *_PATTERNS["position"],
            *_PATTERNS["embedding"],
            "*cls_token*",
            "*class_token*",
            "conv_proj.*",
        ),
        "attention": (*_PATTERNS["query_key"], *_PATTERNS["value_output"], *_ATTENTION),
        "feed_forward": _PATTERNS["feed_forward"],
        "convolution": ("*conv*", "*downsample*", "*shortcut*"),
        "other": ("*",),
    }
)
"""Patterns of the blocks of common models, Transformers and convolutional ones, each parameter in
one: norms, output head, embeddings (of tokens, positions, patches), attention with query, key,
value and output together, feed-forward, convolutions; what has none of these names is "other".

The names are those of `TRANSFORMER_BLOCKS`, of timm's and torchvision's vision Transformers, and of
ResNets.
"""


def layers_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Patterns of a model's layers, for `blocks_of`: numbered modules, or what has no number.

    Args:
        names: of parameters, as in `model.named_parameters()`.

    Returns:
        By layer, in the order of the names: what they have up to their first number, such as "h.3"
        of a GPT-2 or "0" of a `Sequential`, or else the name of their module.

    Example:
        >>> list(layers_of(["wte.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight", "bias"]))
        ['wte', 'h.0', 'bias']
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = name.split(".")
        ends = [place for place, part in enumerate(parts, start=1) if part.isdecimal()]
        layer = ".".join(parts[: ends[0] if ends else max(1, len(parts) - 1)])
        found[layer] = (f"{layer}.*", layer)
    return found


def blocks_of(
    names: Iterable[str], blocks: Mapping[str, Sequence[str]] = TRANSFORMER_BLOCKS
) -> dict[str, tuple[str, ...]]:
    """The names in each block, blocks and names in the order of the names.

    Args:
        names: of parameters, as in `model.named_parameters()`.
        blocks: shell patterns by block, tried in their order, on the name as it is and in lower
            case; the first that matches decides.

    Returns:
        Blocks without a parameter are left out, as are names that no pattern matches.

    Raises:
        InvalidInput: no name matches.

    Example: see the module.
    """
    found: dict[str, list[str]] = {}
    names = list(names)
    for name in names:
        block = _block_of(name, blocks)
        if block is not None:
            found.setdefault(block, []).append(name)
    if not found:
        raise InvalidInput(
            f"blocks: none of {', '.join(blocks)} matches a parameter, of which the first are "
            f"{', '.join(names[:4])}; give patterns of these names"
        )
    return {block: tuple(members) for block, members in found.items()}


def _block_of(name: str, blocks: Mapping[str, Sequence[str]]) -> str | None:
    for block, patterns in blocks.items():
        for pattern in patterns:
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.lower(), pattern):
                return block
    return None


def coordinates(layout: ParameterLayout, names: Iterable[str]) -> Tensor:
    """The places in theta (P,) of the parameters of these names, int64 (p,), in order.

    Raises:
        InvalidInput: a name is not in the layout, or there is none.
    """
    wanted = set(names)
    unknown = wanted.difference(layout.names)
    if unknown or not wanted:
        raise invalid(
            "names", sorted(unknown), "names of parameters in theta: " + ", ".join(layout.names)
        )
    ranges = torch.arange(layout.num_parameters, device="cpu").split(layout.sizes)
    kept = [part for name, part in zip(layout.names, ranges, strict=True) if name in wanted]
    return torch.cat(kept)


class Restricted(OperatorAround):
    """The rows and columns of a symmetric operator at some coordinates: a block of its diagonal.

    A product costs one with the whole operator, which several restrictions can share: its graph is
    built once. Of an operator on shards each process has what it holds of the block.

    Args:
        operator: A, (P, P).
        indices: distinct coordinates of P, int64 (p,), such as `coordinates` gives; of an operator
            on shards in ascending order, the same on all processes.

    Raises:
        InvalidInput: coordinates out of range, given twice or not in order, or none.

    In the units, the dtype and on the device of A.

    Example:
        >>> from thalweg.operators.symmetric import DenseOperator
        >>> whole = DenseOperator(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]))
        >>> (Restricted(whole, torch.tensor([0, 2])) @ torch.tensor([1.0, 0.0])).tolist()
        [1.0, 3.0]
    """

    def __init__(self, operator: SymmetricOperator, indices: Tensor) -> None:
        self.operator = operator
        size = operator.shape[0]
        in_range = len(indices) > 0 and int(indices.min()) >= 0 and int(indices.max()) < size
        if not in_range or len(indices.unique()) < len(indices):
            allowed = f"at least one distinct integer from 0 to {size - 1}"
            raise invalid("indices", f"{len(indices)} of them", allowed)
        self._size, self._sharding = len(indices), None
        around = sharding_of(operator)
        if around is not None:
            if bool((indices.diff() < 0).any()):
                raise invalid("indices", "another order", "ascending ones, for a model in shards")
            self._sharding, indices = _within(around, indices.cpu())
        self.indices = indices.to(operator.device)

    @property
    def sharding(self) -> Sharding | None:
        """Of the block's vectors; None where they are whole."""
        return self._sharding

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        return self._size, self._size

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with (p,) or the columns of (p, k); errors are those of A."""
        return self.product_with_error(vectors)[0]

    def product_with_error(
        self, vectors: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `SymmetricOperator`. At worst the whole error is at these coordinates."""
        rows = plain(rows_of(vectors, self))
        around = sharding_of(self.operator)
        held = self.operator.shape[0] if around is None else around.length
        whole = rows.new_zeros(len(rows), held)
        whole[:, self.indices] = rows
        given = whole if around is None else around.vector(whole)
        image, errors = product_with_error(self.operator, given.T, measured=measured)
        image = plain(image)[self.indices]
        image = image if self._sharding is None else self._sharding.vector(image)
        return image[:, 0] if vectors.dim() == 1 else image, errors


def _within(around: Sharding, indices: Tensor) -> tuple[Sharding, Tensor]:
    """The sharding of a block (p,) of theta, and where its own numbers are in this process's part.

    Args:
        around: that of theta.
        indices: of the block in theta, ascending.
    """

    def places(borders: tuple[int, int]) -> tuple[int, int]:
        begin, end = torch.searchsorted(indices, torch.tensor(borders, device="cpu")).tolist()
        return begin, end

    segments = [[places(borders) for borders in own] for own in around.segments]
    kept, before = [], 0
    for (first, end), (begin, last) in zip(
        around.segments[around.rank], segments[around.rank], strict=True
    ):
        kept.append(indices[begin:last] - first + before)
        before += end - first
    own = torch.cat(kept) if kept else indices[:0]
    within = Sharding(around.group, segments, around.rank)
    # Asked anew at each exchange: a report puts another one there for as long as it lasts.
    within.around_each = lambda: around.around_each()
    return within, own
