"""``--only``: the cells that some words name."""

from __future__ import annotations

from collections.abc import Sequence

from fedstill.errors import InputError
from fedstill.reproduce.tables import Cell, Table


def chosen(table: Table, only: str | None) -> tuple[Cell, ...]:
    """Return the cells that have every kind of word asked for.

    Parameters
    ----------
    table : Table
    only : str or None
        Words joined by commas, such as ``cifar10,beta=0.3,fedftg``: a word or ``kind=word``. Words of one kind are
        alternatives; None for all cells.

    Raises
    ------
    InputError
        For a word that the table does not have, or words that no cell has together; it lists the words there are.
    """
    if only is None:
        return table.cells
    given = [word.strip().lower() for word in only.split(",") if word.strip()]
    alternatives: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for word in given:
        meant = {pair for cell in table.cells for pair in cell.words.items() if word in _spellings(*pair)}
        if not meant:
            raise InputError(f"--only: {table.id} has no {word!r}; {words_of(table)}")
        alternatives.setdefault(tuple(sorted({kind for kind, _ in meant})), set()).update(meant)
    found = [
        cell for cell in table.cells if given and all(pairs & cell.words.items() for pairs in alternatives.values())
    ]
    if not found:
        raise InputError(f"--only: no cell of {table.id} is all of {', '.join(given) or 'nothing'}; {words_of(table)}")
    return tuple(found)


def words_of(table: Table) -> str:
    """Return the words that choose cells of a table, by kind."""
    kinds: dict[str, dict[str, None]] = {}
    for cell in table.cells:
        for kind, word in cell.words.items():
            kinds.setdefault(kind, {})[word] = None
    listed = "; ".join(f"{kind}: {', '.join(_shown(kind, word) for word in words)}" for kind, words in kinds.items())
    return f"there are {listed}"


def _spellings(kind: str, word: str) -> Sequence[str]:
    return [word.lower(), f"{kind}={word}".lower()]


def _shown(kind: str, word: str) -> str:
    """Return a word as one would type it: a number says nothing without its kind."""
    return word if any(letter.isalpha() for letter in word) else f"{kind}={word}"
