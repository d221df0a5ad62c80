"""What all registries share: the error for a name that is not in them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from fedstill.errors import InputError


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for ``name``, with the nearest of the ``known`` names and the list of them."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return InputError(f"unknown {what} {name!r}{hint} There are: {', '.join(names)}")
