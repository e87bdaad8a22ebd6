"""How does a nested state become named tensors and JSON, and come back exactly the same?

A checkpoint holds tensors (safetensors) and JSON, and no pickle. JSON alone would turn integer keys
into text, tuples into lists, and has no NaN; what it lacks is marked here by a dictionary with one
reserved key: `__tensor__`, `__tuple__`, `__dict__` or `__float__`.

Example:
    >>> import torch
    >>> tensors, state = pack_state({"lr": 0.1, "state": {0: {"step": torch.tensor(3.0)}}})
    >>> state
    {'lr': 0.1, 'state': {'__dict__': [[0, {'step': {'__tensor__': 'state/0/step'}}]]}}
    >>> unpack_state(tensors, state)
    {'lr': 0.1, 'state': {0: {'step': tensor(3.)}}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thalweg.errors import IntegrityError, InvalidInput, invalid

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "__"


def pack_state(nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors, by name, and JSON that says where each belongs.

    Args:
        nested: dict, list, tuple, int, float, str, bool, None and tensors in any nesting, such as
            `torch.optim.Optimizer.state_dict()`. Dictionary keys: int, float, str, bool, None, or
            tuples of them.

    Returns:
        tensors: the tensors themselves (not copies), named by their path, as "state/0/exp_avg".
        state: what `json.dumps` takes.

    Raises:
        InvalidInput: something of another type; the message gives its path and type.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(nested, (), tensors)


def unpack_state(tensors: Mapping[str, Tensor], state: Any) -> Any:
    """Rebuild what `pack_state` was given; the tensors are those of `tensors`, not copies.

    Raises:
        IntegrityError: the JSON names a tensor that is not there, or has an unknown mark.
    """
    if isinstance(state, list):
        return [unpack_state(tensors, item) for item in state]
    if not isinstance(state, dict):
        return state
    mark = next(iter(state)) if len(state) == 1 else ""
    if not mark.startswith(_MARK):
        return {key: unpack_state(tensors, item) for key, item in state.items()}
    value = state[mark]
    if mark == "__tensor__" and value in tensors:
        return tensors[value]
    if mark == "__tuple__":
        return tuple(unpack_state(tensors, item) for item in value)
    if mark == "__dict__":
        return {unpack_state(tensors, k): unpack_state(tensors, v) for k, v in value}
    if mark == "__float__":
        return float(value)
    raise IntegrityError(f"checkpoint: state and tensors do not belong together: {state!r}")


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    import torch

    # Exact types: a subclass (an enum, a NumPy float, a named tuple) would not come back as itself.
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"__float__": str(value)}
    if isinstance(value, torch.Tensor):
        name = _free_name("/".join(path) or "value", tensors)
        tensors[name] = value
        return {"__tensor__": name}
    if kind is list:
        return [_pack(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
    if kind is tuple:
        packed = [_pack(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"__tuple__": packed}
    if isinstance(value, dict):
        return _pack_dict(value, path, tensors)
    raise invalid(
        f"state {'/'.join(path) or 'as a whole'}",
        kind.__name__,
        "dict, list, tuple, int, float, str, bool, None or a tensor",
        "convert it first, as by float() or torch.as_tensor()",
    )


def _pack_dict(value: dict[Any, Any], path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if all(type(key) is str and not key.startswith(_MARK) for key in value):
        return {key: _pack(item, (*path, key), tensors) for key, item in value.items()}
    pairs: list[list[Any]] = []
    for key, item in value.items():
        pairs.append([_pack_key(key, path), _pack(item, (*path, str(key)), tensors)])
    return {"__dict__": pairs}


def _pack_key(key: Any, path: tuple[str, ...]) -> Any:
    inside: dict[str, Tensor] = {}
    packed = _pack(key, (*path, "key"), inside)
    if inside:
        raise InvalidInput(f"state {'/'.join(path)}: a tensor cannot be a dictionary's key")
    return packed


def _free_name(name: str, taken: Mapping[str, Tensor]) -> str:
    """Return `name`, or `name` with a number where keys such as 0 and "0" give the same path."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free
