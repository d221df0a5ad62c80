"""The page: its head, its parts one after another, and the files of its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources

from matplotlib.figure import Figure

from fedstill.report.html.smaller import smaller
from fedstill.report.html.style import Drawing, drawing


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Parameters
    ----------
    name : str
        Its anchor.
    title : str
    body : str
        HTML.
    """

    name: str
    title: str
    body: str


@dataclass
class Figures:
    """The figures of a page, by the names of their files."""

    drawn: dict[str, Drawing] = field(default_factory=dict)

    def add(
        self, name: str, figure: Figure, title: str, caption: str, narrow: Figure | None = None, of: str = ""
    ) -> str:
        """Keep a figure and return its HTML.

        Parameters
        ----------
        name : str
            Of its files.
        figure : Figure
        title, caption : str
            What it shows, and how it is read.
        narrow : Figure, optional
            The same for a narrow screen, and for one column of a paper.
        of : str
            The table that it belongs to.
        """
        alt = f"{title}: {of}" if of else title
        self.drawn[name] = drawing(figure, name, alt)
        body = self.drawn[name].inline
        files = name
        if narrow is not None:
            slim = f"{name}-column"
            self.drawn[slim] = drawing(narrow, slim, alt)
            body = f'<div class="wide">{body}</div><div class="narrow">{self.drawn[slim].inline}</div>'
            files = f"{name}, {slim}"
        size = ' class="large"' if narrow is not None else ""
        words = f"<b>{escape(title)}.</b> {escape(caption)}".rstrip()
        return f'<figure id="{name}"{size}><figcaption>{words} <small>{files}</small></figcaption>{body}</figure>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, stressed: Iterable[tuple[int, int]] = ()) -> str:
    """Return a table in a box that it scrolls in; cells are HTML, the first of a row names it."""
    best = set(stressed)
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f"<td>{f'<b>{cell}</b>' if (at, place) in best else cell}</td>" for place, cell in enumerate(row[1:], 1)
        )
        + "</tr>"
        for at, row in enumerate(rows)
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of headings and words."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs) + "</dl>"


def page(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """Return the whole page, in one file."""
    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{one.name}">{escape(one.title)}</a>' for one in sections)
    parts = "".join(f'<section id="{one.name}"><h2>{escape(one.title)}</h2>{one.body}</section>\n' for one in sections)
    parts, classes = smaller(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}{classes}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}<nav>{links}</nav></header>\n<main>\n{parts}</main>\n"
        f"<footer>{foot}</footer>\n</body>\n</html>\n"
    )
