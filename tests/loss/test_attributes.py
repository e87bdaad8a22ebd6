from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

from torch import nn

from thalweg.loss import attributes
from thalweg.loss.attributes import Attributes


def test_numbers_and_nested_containers_are_put_back() -> None:
    inner: Any = defaultdict(list, {"loss": [1.0]})
    holder = SimpleNamespace(count=0, seen={"train": inner}, last=deque([1, 2], maxlen=2), ids={3})
    before = Attributes([holder])
    holder.count += 1
    holder.seen["train"]["loss"].append(2.0)
    holder.seen["train"]["entropy"].append(0.5)
    holder.seen["test"] = {}
    holder.last.append(5)
    holder.ids.add(4)
    holder.fresh = None
    before.put_back()
    assert vars(holder) == {
        "count": 0,
        "seen": {"train": {"loss": [1.0]}},
        "last": deque([1, 2]),
        "ids": {3},
    }
    assert holder.seen["train"] is inner


def test_a_container_that_holds_itself_is_looked_at_once() -> None:
    holder = SimpleNamespace(loop=[1])
    holder.loop.append(holder.loop)
    before = Attributes([holder])
    holder.loop.append(2)
    before.put_back()
    assert holder.loop[0] == 1
    assert len(holder.loop) == 2


def test_what_is_large_is_data_and_not_looked_into(monkeypatch: Any) -> None:
    monkeypatch.setattr(attributes, "MOST_LOOKED_INTO", 2)
    module = nn.Linear(2, 1)
    module.rows = [[1], [2], [3]]  # type: ignore[assignment]
    before = Attributes([module])
    module.rows.append([4])  # type: ignore[operator]
    module.rows[0].append(9)  # type: ignore[index]
    before.put_back()
    assert module.rows == [[1, 9], [2], [3]]
