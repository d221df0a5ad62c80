"""The page as a file: well formed, by itself, with the numbers of the comparison, without what does not apply."""

from __future__ import annotations

import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedstill import cli
from fedstill.errors import InputError
from fedstill.report.html import write_report
from fedstill.studies.compare import Comparison, compare
from fedstill.studies.tables import per_cent, points, sheets
from invented import CLIENTS, METHODS, big_report, write_run, write_study

VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "rect", "image"}
EVERYTHING = [
    "Result",
    "Learning curves",
    "Clients' own models",
    "Accuracies and paired differences",
    "Accuracy against costs",
    "What the refinement gave",
    "Who holds what",
    "Accuracy by class",
    "The worst tenth of the clients",
    "Inside the refinement",
    "Where time goes",
    "Configuration",
    "Environment",
]


class Page(HTMLParser):
    """A page read back: its tags are closed in order, and what stands in them is kept."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.svg_texts: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [value for name, value in found.items() if name == "id" and value]
        self.links += [value for name, value in found.items() if name in ("href", "src", "xlink:href") and value]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "text":
            self.svg_texts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data
        if "text" in self.open:
            self.svg_texts[-1] += data

    @property
    def words(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def big() -> tuple[Comparison, Path, Page]:
    study, path = big_report()
    return compare(study), path, Page(path.read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of one run of one method."""
    run = write_run(tmp_path_factory.mktemp("one") / "run", "fedavg", 0, 0.7, 1)
    return Page(write_report(run).read_text())


# The page


def test_it_is_well_formed_and_in_order(big: tuple[Comparison, Path, Page]) -> None:
    _, _, page = big
    assert page.html.startswith("<!doctype html>")
    assert page.headings == EVERYTHING
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    anchors = [link.removeprefix("#") for link in page.links if link.startswith("#")]
    anchors += re.findall(r"url\(#([^)]*)\)", page.html)
    assert set(anchors) <= set(page.ids)


def test_it_needs_nothing_from_elsewhere(big: tuple[Comparison, Path, Page], small: Page) -> None:
    for page in (big[2], small):
        assert {link.split(",")[0] for link in page.links if not link.startswith("#")} <= {"data:image/png;base64"}
        assert re.findall(r"(?i)\w+://|@import|@font-face|<script|<link|<iframe", page.html) == []
        assert {found.split("(")[1][0] for found in re.findall(r"url\([^)]*", page.html)} <= {"#"}


def test_sixty_runs_are_below_two_megabytes(big: tuple[Comparison, Path, Page]) -> None:
    assert big[1].stat().st_size < 1_000_000  # a quarter of it was measured


def test_its_numbers_are_those_of_the_comparison(big: tuple[Comparison, Path, Page]) -> None:
    found, _, page = big
    (sheet,) = sheets(found)
    assert page.tables[0] == [sheet.header, *sheet.rows]
    (block,) = found.tables
    for summary in block.summaries:
        assert per_cent(summary.quantities["final"]) in page.svg_texts
        for name in ("final", "mean"):
            if name in summary.differences:
                assert points(summary.differences[name]) in page.svg_texts
        if "worst_decile_label_mix" in summary.quantities:
            assert per_cent(summary.quantities["worst_decile_label_mix"]) in page.svg_texts
        for one in summary.per_class:
            assert one is not None
            assert f"{100 * one.mean:.0f}" in page.svg_texts


def test_every_clients_own_model_has_a_row(big: tuple[Comparison, Path, Page]) -> None:
    found, _, page = big
    (own,) = [table for table in page.tables if table[0][0] == "client"]
    assert own[0] == ["client", "alone, round 1", "alone, round 30"]
    assert [row[0] for row in own[1:]] == [*(f"client {client}" for client in range(CLIENTS)), "mean"]
    group = next(one for one in found.tables[0].summaries if one.label == "alone").group
    last = [run.records[29]["fused"]["test"] for run in group.whole.values()]
    for client in (0, 5):
        mean = sum(one["per_client"][client] for one in last) / len(last)
        assert own[1 + client][2].startswith(f"{100 * mean:.1f}")
    assert own[-1][2] == f"{100 * sum(one['accuracy'] for one in last) / len(last):.1f}"


def test_clients_without_models_of_their_own_have_no_such_part(small: Page) -> None:
    assert "Clients' own models" not in small.headings
    assert not [table for table in small.tables if table[0][0] == "client"]


def test_what_is_missing_is_said_at_the_top(big: tuple[Comparison, Path, Page]) -> None:
    page = big[2]
    top = page.html[: page.html.index("<nav>")]
    assert "SCAFFOLD: seed 11 unfinished, 29 of 30 rounds" in top
    assert "59 of 60 runs are whole" in top
    assert "6, shared by dirichlet-per-client, beta 0.1" in top
    assert "30 rounds, all clients in each; 20 local epochs, batches of 16, learning rate 0.1" in top


def test_what_came_out_is_said_in_words(big: tuple[Comparison, Path, Page]) -> None:
    found, _, page = big
    best = max(found.tables[0].summaries, key=lambda one: one.quantities["final"].mean)
    assert best.label == "alone"  # by construction: each variant is higher than the one before
    assert f"After the last round, alone is highest, with {100 * best.quantities['final'].mean:.1f} %." in page.words
    gain = next(one for one in found.tables[0].summaries if one.label == "SCAFFOLD+FedFTG").differences["final"]
    assert gain.low is not None
    assert gain.low > 0
    assert f"SCAFFOLD+FedFTG {points(gain)} from SCAFFOLD" in page.words
    assert "FedAvg+FedFTG is 3.0 points below" in page.words  # its ensembles are, by construction


def test_markup_in_names_is_text(big: tuple[Comparison, Path, Page]) -> None:
    page = big[2]
    assert "<h1>Invented &lt;b&gt;numbers&lt;/b&gt; &amp; $methods$</h1>" in page.html
    assert "<b>numbers" not in page.html


# What does not apply


def test_one_run_of_one_round_has_no_empty_part(small: Page) -> None:
    assert small.headings == [
        "Result",
        "Who holds what",
        "Accuracy by class",
        "The worst tenth of the clients",
        "Where time goes",
        "Configuration",
        "Environment",
    ]
    bodies = re.findall(r"<section[^>]*><h2>[^<]*</h2>(.*?)</section>", small.html, re.DOTALL)
    assert len(bodies) == len(small.headings)
    assert all(re.search(r"<figure|<table|<dl", body) for body in bodies)
    assert not re.search(r"\b(nan|None|inf)\b", small.words)
    assert "<dt>Seeds</dt><dd>0; 1 run</dd>" in small.html
    assert "interval" not in small.words


def test_tables_that_do_not_fit_together_stand_apart(tmp_path: Path) -> None:
    variants = {name: METHODS[name] for name in ("FedAvg", "FedAvg+FedFTG")}
    study = write_study(tmp_path / "study", variants, seeds=[0], betas=[0.1, 1.0], rounds=1)
    path = write_report(study, title="Two tables")
    page = Page(path.read_text())
    assert "<h1>Two tables</h1>" in page.html
    assert [page.html.count(f"<h3>beta={beta}</h3>") for beta in ("0.1", "1.0")] == [7, 7]
    assert [table[0][0] for table in page.tables[:2]] == ["", ""]
    assert "One seed: no spread." in page.words
    names = {file.name for file in (path.parent / "figures").iterdir()}
    assert {"final-beta-0.1.pdf", "final-beta-1.0.svg"} <= names
    differing = page.tables[-1]
    assert differing[0] == ["", "method", "data.beta"]
    assert differing[1:] == [
        ["FedAvg (beta=0.1)", "fedavg", "0.1"],
        ["FedAvg+FedFTG (beta=0.1)", "fedavg+fedftg", "0.1"],
        ["FedAvg (beta=1.0)", "fedavg", "1.0"],
        ["FedAvg+FedFTG (beta=1.0)", "fedavg+fedftg", "1.0"],
    ]


# The figures' files


def test_every_figure_is_a_file_too(big: tuple[Comparison, Path, Page]) -> None:
    _, path, page = big
    shown = re.findall(r'<figure id="([^"]*)"', page.html)
    assert len(shown) == len(set(shown)) > 12
    for name in [*shown, "curves-column"]:
        svg = (path.parent / "figures" / f"{name}.svg").read_text()
        root = ElementTree.fromstring(svg)
        assert any(element.tag.endswith("}text") for element in root.iter()), "text is text"
        assert "var(--" not in svg
        pdf = (path.parent / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/Type3" not in pdf


def test_an_older_report_is_replaced_by_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "alone", 0, 0.7, 1)
    before = {file: file.read_bytes() for file in write_report(run).parent.rglob("*.*")}
    page = run / "report" / "index.html"
    page.write_text(page.read_text().replace('<figure id="time"', '<figure id="gone"'))
    for name in ("gone.svg", "gone.pdf", "gone-column.svg", "mine.svg"):
        (run / "report" / "figures" / name).write_text("")
    after = {file: file.read_bytes() for file in write_report(run).parent.rglob("*.*")}
    assert after == before | {run / "report" / "figures" / "mine.svg": b""}


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "alone", 0, 0.7, 1)
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match=r"taken: the report cannot be written"):
        write_report(run, tmp_path / "taken")


# The command


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["fedstill", "report", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_command_says_where_the_report_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study", {"alone": ("alone", None)}, seeds=[0], rounds=1)
    assert called(monkeypatch, str(study)) == 0
    assert f"the report is in {study / 'report' / 'index.html'}" in capsys.readouterr().out
    runs = [str(write_run(tmp_path / "loose" / method, method, 0, 0.5, 1)) for method in ("fedavg", "scaffold")]
    assert called(monkeypatch, *runs, "--title", "A title") == 0
    assert "<h1>A title</h1>" in (tmp_path / "loose" / "report" / "index.html").read_text()
    assert called(monkeypatch, str(tmp_path / "nothing")) == 2
    assert called(monkeypatch, runs[0], "--on", "validation") == 2
    assert "no accuracy on validation samples" in capsys.readouterr().err


def test_a_table_without_a_whole_run_has_no_figures_and_the_others_have(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", {"FedAvg": ("fedavg", None)}, seeds=[0, 1], rounds=3, betas=[0.1, 0.3])
    for metrics in (study / "beta-0.3").rglob("metrics.jsonl"):
        metrics.unlink()
    html = write_report(study).read_text(encoding="utf-8")
    assert "Learning curves" in Page(html).headings
    assert len(re.findall(r"<h3>[^<]*0\.1", html)) > 1
    assert len(re.findall(r"<h3>[^<]*0\.3", html)) == 1, "the result alone names it"
