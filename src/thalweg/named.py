"""Things that are registered under a name: claims, figures, panels, probes.

Example:
    >>> from types import SimpleNamespace
    >>> colours = Named("colour")
    >>> colours.add(SimpleNamespace(name="red")).name, list(colours)
    ('red', ['red'])
    >>> colours.find("rde")
    Traceback (most recent call last):
    thalweg.errors.InvalidInput: colour: got 'rde', allowed: one of red; did you mean 'red'?
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from thalweg.errors import invalid, unknown_name


class HasName(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name."""
        ...


T = TypeVar("T", bound=HasName)


class Named(dict[str, T]):
    """Entries of one kind by name, in the order in which they were added.

    Args:
        kind: what they are, in the singular ("claim"), for messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, entry: T) -> T:
        """Register an entry under its name, and return it.

        Raises:
            InvalidInput: the name is taken.
        """
        self.refuse_taken(entry.name)
        self[entry.name] = entry
        return entry

    def refuse_taken(self, name: str) -> None:
        """Check that a name is free.

        Raises:
            InvalidInput: it is not.
        """
        if name in self:
            raise invalid(f"{self.kind} name", name, "a name not used yet", "choose another name")

    def find(self, name: str) -> T:
        """The entry of that name.

        Raises:
            InvalidInput: there is none; the message has the nearest name.
        """
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return self[name]
