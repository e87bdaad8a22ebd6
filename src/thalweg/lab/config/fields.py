"""What does a spec allow at a key path?

Walks the types of a spec along a path such as `phases.0.optimizer.lr` and says in words what may
stand there. Messages, overrides and documentation all use these words, made from the types alone,
so that they hold for a user's own settings too.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from thalweg.registry import NAME_PATTERN, NAME_WORDS
from thalweg.settings import Choice, Wording

Location = tuple[str | int, ...]
LONGEST_PART = 80
"""Characters of a key that a message shows."""
_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Place:
    """What is declared at a key path: a type, and the limits and markers on it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    def alternatives(self) -> tuple[Place, ...]:
        """The members of a union, without None; of any other type, itself."""
        if get_origin(self.annotation) is Annotated:
            inner, *outer = get_args(self.annotation)
            return Place(inner, (*self.metadata, *_flat(outer))).alternatives()
        if get_origin(self.annotation) in (Union, types.UnionType):
            members = [m for m in get_args(self.annotation) if m is not type(None)]
            return tuple(p for m in members for p in Place(m, self.metadata).alternatives())
        return (self,)

    def choice(self) -> Choice | None:
        """The registry that the place chooses from, if it does."""
        return next((m for m in self.metadata if isinstance(m, Choice)), None)

    def accepts(self, kind: type) -> bool:
        """Whether a value of this built-in type (str, int, float, bool, tuple) can stand here."""
        return any(_base(p) is kind for p in self.alternatives())

    def allowed(self) -> str:
        """What may stand here, in words."""
        places = self.alternatives()
        if len(places) == 1:
            return _words(places[0])
        *most, last = [word for place in places for word in _short_words(place)]
        return f"{', '.join(most)} or {last}"

    def names(self) -> tuple[str, ...]:
        """The words that may stand here, where they are a closed list."""
        found: list[str] = []
        for place in self.alternatives():
            choice = place.choice()
            if choice is not None:
                found += choice.registry.names()
            elif get_origin(place.annotation) is Literal:
                found += [str(word) for word in get_args(place.annotation)]
        return tuple(found)

    def keys(self, value: Any) -> dict[str, Place]:
        """The keys of the table that may stand here; `value`, what stands there, names a choice."""
        found: dict[str, Place] = {}
        for place in self.alternatives():
            found |= _table(place, value)
        return found

    def key_place(self) -> Place:
        """What the names of a table with free names may be."""
        return next(Place(get_args(p.annotation)[0]) for p in self.alternatives())

    def into(self, part: str | int, value: Any) -> Place | None:
        """The place one step further along a key path, None where there is none."""
        for place in self.alternatives():
            arguments = get_args(place.annotation)
            origin = get_origin(place.annotation)
            if origin is tuple and isinstance(part, int):
                if arguments[-1] is Ellipsis:
                    return Place(arguments[0])
                return Place(arguments[part]) if part < len(arguments) else None
            if origin is dict:
                return Place(arguments[1])
            table = _table(place, value)
            if part in table:
                return table[str(part)]
        return None


def walk(model: type[BaseModel], location: Sequence[str | int], raw: Any) -> tuple[Place, Location]:
    """The place at a key path, or the last one on the way; and the part of the path it has."""
    place = Place(model)
    for reached, part in enumerate(location):
        further = place.into(part, raw)
        if further is None:
            return place, tuple(location[:reached])
        place, raw = further, value_at(raw, (part,))
    return place, tuple(location)


def value_at(raw: Any, location: Sequence[str | int]) -> Any:
    """What the user gave at a key path; None where nothing."""
    for part in location:
        if isinstance(raw, Mapping):
            raw = raw.get(part)
        elif isinstance(raw, list | tuple) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return None
    return raw


def all_keys(place: Place, raw: Any, path: Location = ()) -> Iterator[Location]:
    """Every key path that a spec can have, with what was given deciding on the choices."""
    for name, inner in place.keys(raw).items():
        here = (*path, name)
        yield here
        given = value_at(raw, (name,))
        for member in inner.alternatives():
            if get_origin(member.annotation) is tuple:
                yield from all_keys(
                    Place(get_args(member.annotation)[0]), value_at(given, (0,)), (*here, 0)
                )
            elif get_origin(member.annotation) is not dict:
                yield from all_keys(member, given, here)


def dotted(location: Sequence[str | int]) -> str:
    """The key path as the user writes it."""
    return ".".join(str(part)[:LONGEST_PART] for part in location)


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    """Limits and markers, also those inside a `Field(...)`."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _base(place: Place) -> Any:
    origin = get_origin(place.annotation)
    if place.choice() is not None or origin is Literal:
        return str
    return origin or place.annotation


def _table(place: Place, value: Any) -> dict[str, Place]:
    choice = place.choice()
    if choice is not None:
        name = value.get("name") if isinstance(value, Mapping) else value
        names = Literal[choice.registry.names()]  # type: ignore[valid-type]
        found = {"name": Place(names, (Wording(_words(place)),))}
        if isinstance(name, str) and name in choice.registry:
            found |= _fields(choice.registry[name])
        return found
    is_model = isinstance(place.annotation, type) and issubclass(place.annotation, BaseModel)
    return _fields(place.annotation) if is_model else {}


def _fields(model: type[BaseModel]) -> dict[str, Place]:
    return {
        name: Place(field.annotation, tuple(field.metadata))
        for name, field in model.model_fields.items()
    }


def _words(place: Place) -> str:
    """One alternative in words."""
    for mark in place.metadata:
        if isinstance(mark, Wording):
            return mark.text
    choice = place.choice()
    if choice is not None:
        return "one of " + ", ".join(choice.registry.names())
    annotation, origin = place.annotation, get_origin(place.annotation)
    if origin is Literal:
        names = [repr(word) for word in get_args(annotation)]
        return names[0] if len(names) == 1 else "one of " + ", ".join(names)
    if origin is tuple:
        return _array_words(place)
    pattern = _marks(place, "pattern")
    if annotation is str and pattern:
        return NAME_WORDS if pattern[0] == NAME_PATTERN else f"text that matches {pattern[0]}"
    if annotation in _PLAIN:
        bounds = [
            f"{sign} {limit:g}" for key, sign in _BOUNDS.items() for limit in _marks(place, key)
        ]
        return " ".join([_PLAIN[annotation], " and ".join(bounds)]).strip()
    return "a table"


def _short_words(place: Place) -> list[str]:
    """The same as one of several alternatives: a closed list gives each of its words."""
    is_list = get_origin(place.annotation) is Literal
    return [repr(word) for word in get_args(place.annotation)] if is_list else [_words(place)]


def _array_words(place: Place) -> str:
    arguments = get_args(place.annotation)
    if arguments[-1] is Ellipsis:
        some = "a non-empty array" if _marks(place, "min_length") else "an array"
        return f"{some}, each {Place(arguments[0]).allowed()}"
    return f"an array of {len(arguments)}, each {Place(arguments[0]).allowed()}"


def _marks(place: Place, key: str) -> list[Any]:
    found = (getattr(mark, key, None) for mark in place.metadata)
    return [value for value in found if value is not None]
