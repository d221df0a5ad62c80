"""What the figures are made of: gains and losses by round, names, colours, lines, SVG for the page."""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedstill.report.html import bars, style
from fedstill.report.html.content import brief, client_names, gain, gathered, losses, over_base, own_models, phases
from fedstill.report.html.lines import DRAWN, Axis, Line, best_for, by_client, frontier, lines, thinned, wrapped
from fedstill.report.html.style import SERIES, Palette, drawing, in_style
from fedstill.studies.compare import Summary, compare
from fedstill.studies.results import read_run
from fedstill.studies.statistics import Difference, Spread
from invented import CLIENTS, write_run, write_study

ROUNDS, PARTS = Axis("round", whole=True), Axis("accuracy", per_cent=True)


def of(folder: Path, label: str) -> Summary:
    (table,) = compare(folder).tables
    return next(one for one in table.summaries if one.label == label)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    variants = {"FedAvg": ("fedavg", None), "FedAvg+FedFTG": ("fedavg+fedftg", "FedAvg")}
    return write_study(tmp_path / "study", variants, seeds=[0, 1], rounds=2)


# By round


def test_a_gain_and_the_room_above_it(study: Path) -> None:
    found = gain(of(study, "FedAvg+FedFTG"), "test")
    assert found is not None
    # refined is a tenth over the round above the fused model, the best ensemble 0.03 above that
    assert [one.mean for one in found.given.values()] == pytest.approx([0.1, 0.05])
    assert [one.mean for one in found.room.values()] == pytest.approx([0.13, 0.08])
    assert list(found.given) == [1, 2]
    assert found.alike
    assert gain(of(study, "FedAvg"), "test") is None
    assert gain(of(study, "FedAvg+FedFTG"), "validation") is None


def test_the_room_is_that_above_the_fused_model_on_the_same_samples(study: Path) -> None:
    for file in study.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if "ensembles" in line:  # on a part of the samples that is easier by 0.04
                line["ensembles"] = {kind: value + 0.04 for kind, value in line["ensembles"].items()}
                assert line["ensembles"]["fused"] == pytest.approx(line["fused"]["test"]["accuracy"] + 0.04)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gain(of(study, "FedAvg+FedFTG"), "test")
    assert found is not None
    assert found.alike
    assert [one.mean for one in found.room.values()] == pytest.approx([0.13, 0.08])
    (summary,) = [one for one in compare(study).tables[0].summaries if one.label == "FedAvg+FedFTG"]
    of_part, of_all = (summary.quantities[f"{kind}_last"].mean for kind in ("beside_ensembles", "fused"))
    assert of_part == pytest.approx(of_all + 0.04)


def test_older_runs_have_no_fused_model_beside_their_ensembles(study: Path) -> None:
    for file in study.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line.get("ensembles", {}).pop("fused", None)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gain(of(study, "FedAvg+FedFTG"), "test")
    assert found is not None
    assert not found.alike
    assert [one.mean for one in found.room.values()] == pytest.approx([0.13, 0.08])


def test_a_difference_by_round_is_taken_on_the_same_seeds(study: Path) -> None:
    (table,) = compare(study).tables
    base, variant = table.summaries
    found = over_base(variant, table, "test")
    assert found[2].n == 2
    for round, one in found.items():
        expected = [
            run.records[round - 1]["refined"]["test"]["accuracy"]
            - base.group.whole[seed].records[round - 1]["fused"]["test"]["accuracy"]
            for seed, run in variant.group.whole.items()
        ]
        assert one.mean == pytest.approx(sum(expected) / 2)
    assert over_base(base, table, "test") == {}


def test_losses_and_seconds(study: Path) -> None:
    summary = of(study, "FedAvg+FedFTG")
    found = losses(summary)
    assert {metric: one[2].mean for (_, metric), one in found.items()} == {
        "student_loss": 0.5,
        "generator_cls": 0.25,
        "generator_md": 0.0,
        "label_accuracy": 0.9,
    }
    assert {name: one.mean for name, one in phases(summary).items()} == pytest.approx(
        {"train": 4.0, "fuse": 0.2, "evaluate": 1.0, "refine": 6.0}
    )


def test_own_models_by_client_and_round(tmp_path: Path) -> None:
    summary = of(write_study(tmp_path / "study", {"alone": ("alone", None)}, seeds=[0, 1], rounds=3), "alone")
    found = own_models(summary, "test")
    assert len(found) == CLIENTS
    for client, points in enumerate(found):
        for round, one in points.items():
            seeds = [run.records[round - 1]["fused"]["test"]["per_client"] for run in summary.group.whole.values()]
            assert one.mean == pytest.approx((seeds[0][client] + seeds[1][client]) / 2)
            assert one.n == 2
    assert own_models(summary, "validation") == []


def test_a_client_is_named_with_its_model_where_models_differ(tmp_path: Path) -> None:
    models = 'model=[{name="mlp"},{name="mlp",hidden=[7]},{name="cnn",clients=[4]}]'
    (one, two) = (write_run(tmp_path / str(at), "alone", 0, 0.5, 1, *keys) for at, keys in enumerate([[], [models]]))
    names = [client_names(read_run(run), 6) for run in (one, two)]
    assert names[0] == [f"client {client}" for client in range(6)]
    assert names[1] == ["0, mlp", "1, mlp", "2, mlp", "3, mlp", "4, cnn", "5, mlp"]


def test_losses_of_several_architectures_are_their_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "fedavg+fedftg", 0, 0.7, 1)
    text = (run / "metrics.jsonl").read_text()
    named = '"refinement": {"by_model": {"a": {"fedftg": {"student_loss": 1}}, "b": {"fedftg": {"student_loss": 2}}}}'
    (run / "metrics.jsonl").write_text(re.sub(r'"refinement": \{"fedftg": \{[^}]*\}\}', named, text))
    (summary,) = compare(run).tables[0].summaries
    assert losses(summary) == {("fedftg", "student_loss"): {1: Spread(1.5, None, 1)}}


# Costs


def costs(name: str, x: list[float], y: list[float]) -> Line:
    return Line(name, name, x, [Spread(value, None, 1) for value in y])


def test_the_best_for_each_cost_by_hand() -> None:
    cheap = costs("cheap", [1.0, 2.0, 3.0], [0.3, 0.5, 0.6])
    dear = costs("dear", [1.02, 2.5, 9.0], [0.4, 0.5, 0.9])
    found = [(line.label, x, mean) for line, x, mean in best_for([cheap, dear])]
    # 0.3 for 1 is below 0.4 for about as much; 0.5 for 2.5 is no more than 0.5 for 2
    assert found == [("dear", 1.02, 0.4), ("cheap", 2.0, 0.5), ("cheap", 3.0, 0.6), ("dear", 9.0, 0.9)]


def test_of_many_methods_those_that_are_best_somewhere_are_named() -> None:
    many = [costs(f"method {at}", [1.0, 2.0], [0.1, 0.2 + 0.01 * at]) for at in range(20)]
    figure = frontier([*many, costs("early", [0.5, 3.0], [0.15, 0.2])], Axis("MB"), PARTS)
    (axes,) = figure.axes
    words = [text.get_text() for text in axes.texts]
    assert words == ["15.0  early", "39.0  method 19"]


# Names


def test_loose_runs_are_named_by_as_few_keys_as_tell_them_apart(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "fedavg", 0, 0.5, 1, "local.lr=0.1"),
        write_run(tmp_path / "b", "fedavg+fedftg", 0, 0.5, 1, "fedftg.lambda_cls=1", "local.lr=0.2"),
        write_run(tmp_path / "c", "fedavg+fedftg", 0, 0.5, 1, "fedftg.lambda_cls=2", "local.lr=0.2"),
    ]
    found = compare(runs)
    assert [one.label for one in found.tables[0].summaries][1] == "fedavg+fedftg, local.lr=0.2, fedftg.lambda_cls=1.0"
    (table,) = brief(found).tables
    assert [one.label for one in table.summaries] == [
        "fedavg",
        "fedavg+fedftg, lambda_cls=1.0",
        "fedavg+fedftg, lambda_cls=2.0",
    ]
    assert [one.base for one in table.summaries] == [None, "fedavg", "fedavg"]
    assert [one.quantities for one in table.summaries] == [one.quantities for one in found.tables[0].summaries]


def test_keys_that_end_alike_keep_their_tables(tmp_path: Path) -> None:
    variants = {"x, local.lr=1": ("fedavg", None), "x, server.lr=2": ("scaffold", None), "y, a.b=3": ("alone", None)}
    (table,) = brief(compare(write_study(tmp_path / "study", variants, seeds=[0], rounds=1))).tables
    assert [one.label for one in table.summaries] == ["x, local.lr=1", "x, server.lr=2", "y, b=3"]


# Colours


def test_a_method_has_one_colour_and_a_family_one_hue(study: Path) -> None:
    content = gathered([study], title=None, on="test", baseline=None, anyway=False)
    assert [content.colour(one) for one in content.blocks[0].shown] == list(SERIES[:2])
    many = Palette.of([(f"m{place}", f"m{place}") for place in range(8)])
    assert len({many[f"m{place}"] for place in range(8)}) == 8
    none = Palette.of([(f"m{place}", "") for place in range(9)])
    assert not none.tells
    assert {none[f"m{place}"] for place in range(9)} == {SERIES[0]}
    assert none.css("m1") == ""


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_stand_out_from_the_page_in_light_and_dark(scheme: int) -> None:
    css = resources.files("fedstill.report.html").joinpath("page.css").read_text()
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split("prefers-color-scheme: dark")[scheme]))
    series = [found[f"series-{place}"] for place in range(len(SERIES))]
    assert len(set(series)) == len(SERIES)
    paper = luminance(found["paper"])
    for name, least in [("ink", 12), ("faint", 4.5), *((f"series-{place}", 3) for place in range(len(SERIES)))]:
        light, dark = sorted((luminance(found[name]), paper), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, name


# Lines


def test_long_lines_keep_their_ends_and_few_points() -> None:
    assert thinned(7, 10) == list(range(7))
    places = thinned(1000, 50)
    assert (places[0], places[-1], len(places)) == (0, 999, 50)
    assert {later - before for before, later in pairwise(places)} <= {20, 21}
    line = Line.of("name", "name", range(5000), [Spread(0.5, None, 1)] * 5000)
    assert (len(line.x), line.x[-1]) == (DRAWN, 4999)


def some(count: int) -> list[Line]:
    y = [Spread(0.5, 0.1, 3), Spread(0.6, 0.1, 3)]
    return [Line(f"method {place}", f"m{place}", [1, 2], y) for place in range(count)]


def test_up_to_eight_methods_share_a_panel_and_more_have_one_each() -> None:
    with in_style():
        palette = Palette.of([(f"m{place}", f"m{place}") for place in range(8)])
        together = lines(some(8), palette, ROUNDS, PARTS)
        apart = lines(some(9), Palette(), ROUNDS, PARTS)
    assert len(together.axes) == 1
    shown = [text.get_text() for text in together.axes[0].texts]
    assert sorted(shown) == [f"60.0  method {place}" for place in range(8)]
    assert together.axes[0].get_legend() is None
    visible = [axes for axes in apart.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == [f"60.0  method {place}" for place in range(9)]


def test_each_client_has_a_panel_and_what_was_measured_once_crosses_it() -> None:
    one, two = some(2)
    once = Line("pooled", "m1", [1], [Spread(0.9, None, 1)])
    with in_style():
        palette = Palette.of([("m0", "m0"), ("m1", "m1")])
        figure = by_client({"client 0": [one, once], "client 1": [two, once], "client 2": [one]}, palette, PARTS)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["client 0", "client 1", "client 2"]
    drawn = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in panels]
    assert drawn == [[([1, 2], [0.5, 0.6]), ([0, 1], [0.9, 0.9])]] * 2 + [[([1, 2], [0.5, 0.6])]]
    assert panels[0].get_ylim()[1] > 0.9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["method 0", "pooled", "method 1"]


def test_a_band_is_one_standard_deviation() -> None:
    (line,) = some(1)
    assert line.low == pytest.approx([0.4, 0.5])
    assert line.high == pytest.approx([0.6, 0.7])


def test_names_are_broken_where_they_can_be() -> None:
    assert wrapped("FedAvg", 10) == "FedAvg"
    assert wrapped("FedAvg+FedFTG, lambda_md=0", 14) == "FedAvg+FedFTG,\nlambda_md=0"
    assert wrapped("scaffold+fedftg", 12) == "scaffold+\nfedftg"
    assert wrapped("x" * 30, 10) == "\n".join(["x" * 10] * 3)
    assert wrapped("one two three four five", 5, most=2) == "one\ntwo…"


# Rows


def test_an_interval_is_drawn_from_end_to_end() -> None:
    with in_style():
        figure = bars.forest([("a", SERIES[0], Difference(0.02, -0.01, 0.05, 3))], "points")
        one = bars.forest([("a", SERIES[0], Difference(0.02, None, None, 1))], "points")
    drawn = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert [-0.01, 0.05] in drawn
    assert [0.02] in drawn
    assert all(len(line.get_xdata()) == 1 for line in one.axes[0].lines if line.get_xdata()[0] != 0)
    assert "+2.0 [-1.0, +5.0]" in [text.get_text() for text in figure.axes[0].texts]


def test_bars_begin_at_zero_and_phases_add_up() -> None:
    with in_style():
        figure = bars.bars([bars.Bar("a", "50.0", SERIES[0], Spread(0.5, 0.1, 2), [0.4, 0.6])])
        stack = bars.stacks([("a", SERIES[0], {"train": Spread(2, None, 1), "own": Spread(3, None, 1)})])
    (bar,) = figure.axes[0].patches[:1]
    assert (bar.get_x(), bar.get_width()) == (0, 0.5)
    assert [(patch.get_x(), patch.get_width()) for patch in stack.axes[0].patches][1:] == [(0, 2), (2, 3)]
    assert "5.0 s" in [text.get_text() for text in stack.axes[0].texts]


# SVG for the page


def drawn(text: str, name: str = "name") -> style.Drawing:
    with in_style():
        figure = Figure(figsize=(2, 2))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot([0.1234567, 1.7654321, 2.5], [1.1111111, 2.2222222, 0.3333333], color=SERIES[0])
        axes.set_title(text)
        return drawing(figure, name, "what it shows")


def test_text_is_never_rounded() -> None:
    found = drawn("0.123456 -0.0004 12.3456789")
    assert ">0.123456 -0.0004 12.3456789<" in found.inline
    assert ">0.123456 -0.0004 12.3456789<" in found.svg.decode()
    coordinates = re.findall(r' (?:d|x|y)="([^"]*)"', found.inline)
    assert not re.search(r"\.\d{3,}", " ".join(coordinates))


def test_steps_lead_to_the_same_points() -> None:
    path = "M 10.123 20.456 \nL 30.789 5.25 \nL 30.789 -7.5 \nM 1 2 \nL 1.004 2 \nz\n"
    made = style._steps(path, 2)
    assert made == "M10.12 20.46l20.67-15.21l0-12.75M1 2l0 0z"
    at, points = np.zeros(2), []
    for command, x, y in re.findall(r"([Ml])(-?[\d.]+) ?(-?[\d.]+)", made):
        at = np.array([float(x), float(y)]) + (at if command == "l" else 0)
        points.append(at)
    wanted = [(10.123, 20.456), (30.789, 5.25), (30.789, -7.5), (1, 2), (1.004, 2)]
    assert np.abs(np.array(points) - wanted).max() < 0.0051
    assert style._steps("M 0 0 C 1 2 3 4 5 6", 2) == "M 0 0 C 1 2 3 4 5 6"


def test_colours_are_variables_on_the_page_alone() -> None:
    found = drawn("a $title$ & <more>")
    assert "stroke:var(--series-0)" in found.inline
    assert SERIES[0].lower() in found.svg.decode()
    assert "a $title$ &amp; &lt;more&gt;" in found.inline
    assert 'aria-label="what it shows"' in found.inline
    assert "xmlns" not in found.inline
    assert re.findall(r'id="(?!name-)', found.inline) == []
