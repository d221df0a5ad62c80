"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """Return a table whose first ``left`` columns, or all, are set to the left, the others to the right.

    Cells are taken as they are: nothing in them is escaped.

    Examples
    --------
    >>> print(grid(["method", "accuracy"], [["FedAvg", "61.2"]]))
    | method | accuracy |
    | --- | ---: |
    | FedAvg | 61.2 |
    """
    texts = len(header) if left is None else left
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
