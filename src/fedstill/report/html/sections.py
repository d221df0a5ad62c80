"""The parts of the page, in their order; a part that does not apply is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from matplotlib.figure import Figure

from fedstill.data.picture import partition_figure
from fedstill.data.sources import source_of
from fedstill.report.html import bars, grids, words
from fedstill.report.html import content as found_in
from fedstill.report.html.content import Block, Content, Gain, Points
from fedstill.report.html.lines import DRAWN, Axis, Line, by_client, frontier, gains, lines
from fedstill.report.html.page import Figures, Section, facts, table
from fedstill.report.html.style import COLUMN, Palette
from fedstill.report.samples import ClassSamples, class_samples, has_generator
from fedstill.studies.compare import Summary
from fedstill.studies.costs import On
from fedstill.studies.results import RunData
from fedstill.studies.tables import LONGEST_BASE, per_cent

SAMPLE_CLASSES = 10
SAMPLE_VALUES = 250_000
"""Pixels times channels of all generators' samples together: what the page has room for."""
OWN_MODELS = 20
"""Clients whose own models are shown one by one."""
MADE = (8, 5, 3)
"""The generator's images of a class: as many as there is room for."""
METRICS = {
    "student_loss": "What the student lowers: its distance from the teachers",
    "generator_md": "What the generator raises: how far student and teachers disagree on its samples",
    "generator_cls": "Cross-entropy of the teachers on the generator's samples",
    "generator_dis": "The generator's diversity loss",
    "generator_bn": "Distance of the samples to the teachers' BatchNorm statistics",
    "label_accuracy": "Share of the samples whose label the teachers see, in %",
    "grad_norm": "Length of the student's gradient before the clip",
    "validation_accuracy": "Accuracy of the student on the server's validation part, in %",
    "accepted": "Share of the refinements that were accepted, in %",
}
"""What a refinement's metrics are, for the captions."""
WORST = {
    "own_samples": ("On their own held-out samples", "all clients' held-out samples"),
    "label_mix": ("On test samples mixed like their own labels", "all test samples"),
    "own_models": ("Their own models, on all samples", "mean over all clients"),
}
"""How the worst tenth is measured: in words, and what it stands beside."""


@dataclass(frozen=True)
class Place:
    """Where figures are being added: a table of the comparison, on the page."""

    content: Content
    block: Block
    figures: Figures

    @property
    def palette(self) -> Palette:
        """The page's."""
        return self.content.palette

    @property
    def on(self) -> On:
        """The samples that accuracies are measured on."""
        return self.content.comparison.on

    @property
    def shown(self) -> list[Summary]:
        """The groups that have figures."""
        return self.block.shown

    @property
    def panels(self) -> str:
        """What is grey in panels, where there are panels."""
        return "" if self.palette.tells else " Grey: the range of all methods' means; dashed: the method's base."

    def key(self, summary: Summary) -> str:
        """Return what a group's colour goes by."""
        return self.content.key(summary)

    def colour(self, summary: Summary) -> str:
        """Return a group's colour."""
        return self.palette[self.key(summary)]

    def spread(self, said: str) -> str:
        """Return the sentence on what shows the spread, where there is one."""
        return said if any(one.quantities["final"].std is not None for one in self.shown) else "One seed: no spread."

    def add(self, name: str, figure: Figure, title: str, caption: str, narrow: Figure | None = None) -> str:
        """Add a figure; its file's name tells the table, too."""
        file = "-".join(part for part in (name, self.block.name) if part)
        return self.figures.add(file, figure, title, caption, narrow, self.block.title)


Part = Callable[[Place], Iterator[str]]


def lead(content: Content) -> str:
    """Return what was run, below the title, and what is missing of it."""
    lost = words.missing(content)
    warning = f'<div class="warn">Not whole, and not in the figures:{_list(lost)}</div>' if lost else ""
    return facts(words.what_was_run(content).items()) + warning


def sections(content: Content, figures: Figures) -> list[Section]:
    """Return the parts that apply; their figures are added to ``figures``."""
    parts: list[tuple[str, str, Part]] = [
        ("curves", "Learning curves", _curves),
        ("own-models", "Clients' own models", _own_models),
        ("final", "Accuracies and paired differences", _final),
        ("costs", "Accuracy against costs", _costs),
        ("refinement", "What the refinement gave", _refinement),
        ("clients", "Who holds what", _clients),
        ("classes", "Accuracy by class", _classes),
        ("worst", "The worst tenth of the clients", _worst),
        ("losses", "Inside the refinement", _losses),
    ]
    made = [("result", "Result", _result(content))]
    made += [(name, title, _each(content, figures, part)) for name, title, part in parts]
    made += [
        ("samples", "What the generator makes", _samples(content, figures)),
        ("time", "Where time goes", _each(content, figures, _time)),
        ("configuration", "Configuration", _configuration(content)),
        ("environment", "Environment", _environment(content)),
    ]
    return [Section(f"part-{name}", title, body) for name, title, body in made if body]


def _each(content: Content, figures: Figures, part: Part) -> str:
    """Return what each table has to show, under its title; one without a whole run has nothing."""
    found = []
    for block in filter(lambda block: block.shown, content.blocks):
        if body := "".join(part(Place(content, block, figures))):
            found.append(f'{_heading(block)}<div class="figures">{body}</div>')
    return "".join(found)


def _heading(block: Block) -> str:
    return f"<h3>{escape(block.title)}</h3>" if block.title else ""


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _notes(lines: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


# The result


def _result(content: Content) -> str:
    found = []
    for block in content.blocks:
        sheet = block.sheet
        rows = [
            [_with_dot(content, summary, escape(cells[0])), *map(escape, cells[1:])]
            for summary, cells in zip(block.table.summaries, sheet.rows, strict=True)
        ]
        said = words.verdict(block, content.comparison.on)
        found += [_heading(block), _list(said) if said else ""]
        results = table([escape(name) for name in sheet.header], rows, stressed=sheet.best)
        found += [f'<div class="results">{results}</div>', _notes(block.sheet.notes)]
    return "".join(found)


def _with_dot(content: Content, summary: Summary, label: str) -> str:
    colour = content.palette.css(content.key(summary))
    if not colour:
        return label
    return f'<span class="named"><span class="dot" style="background: {colour}"></span><span>{label}</span></span>'


# Accuracy


def _curves(place: Place) -> Iterator[str]:
    shown = [
        Line.of(
            one.label, place.key(one), [band.round for band in one.curve], [band.accuracy for band in one.curve],
            one.base,
        )
        for one in place.shown
    ]  # fmt: skip
    rounds = max(len(one.curve) for one in place.shown)
    if rounds < 2:
        return
    x, y = Axis("round", whole=True), Axis(f"accuracy on {place.on} samples in %", per_cent=True)
    caption = "Of the refined model, or of the fused one where nothing refines. "
    caption += place.spread("Line: mean over seeds; band: one standard deviation.") + place.panels
    if rounds > DRAWN:
        caption += f" Not every one of the {rounds:,} evaluated rounds is drawn."
    wide, narrow = (lines(shown, place.palette, x, y, wide=wide) for wide in (True, False))
    yield place.add("curves", wide, "Accuracy over the rounds", caption, narrow)
    named, base = _against(place.block)
    over = {
        named(one): (place.key(one), Gain(own, {}))
        for one in place.shown
        if (own := found_in.over_base(one, place.block.table, place.on))
    }
    if over:
        caption = place.spread("Line: mean of the differences on the same seeds; band: one standard deviation.")
        title = "Difference from the base by round"
        yield _panels(place, "over-base", over, f"points above {base}", title, caption)


def _own_models(place: Place) -> Iterator[str]:
    every = [(one, points) for one in place.shown if (points := found_in.own_models(one, place.on))]
    count = max((len(points) for _, points in every), default=0)
    found = [(one, points) for one, points in every if len(points) == count]
    if not 2 <= count <= OWN_MODELS:
        return
    names = found_in.client_names(place.block.runs[0], count)
    if place.palette.tells and max(len(own) for _, points in found for own in points) > 1:
        shown = {
            name: [
                Line.of(one.label, place.key(one), list(points[client]), list(points[client].values()))
                for one, points in found
            ]
            for client, name in enumerate(names)
        }
        y = Axis(f"accuracy on {place.on} samples in %", per_cent=True)
        caption = place.spread("Line: mean over seeds; band: one standard deviation.")
        if any(len(own) == 1 for _, points in found for own in points):
            caption += " Dashed: measured once."
        wide, narrow = (by_client(shown, place.palette, y, wide=wide) for wide in (True, False))
        yield place.add("own-models", wide, "Each client's own model over the rounds", caption, narrow)
    yield _first_and_last(found, names)


def _first_and_last(found: Sequence[tuple[Summary, list[Points]]], names: Sequence[str]) -> str:
    """Return a table of each client's accuracy in the first and the last measured round."""
    columns = [
        (f"{one.label}, round {round}", [own[round] for own in points])
        for one, points in found
        for round in dict.fromkeys((min(points[0]), max(points[0])))
    ]
    rows = [[escape(name), *(escape(per_cent(own[client])) for _, own in columns)] for client, name in enumerate(names)]
    means = [sum(one.mean for one in own) / len(own) for _, own in columns]
    rows.append(["mean", *(f"{100 * mean:.1f}" for mean in means)])
    header = ["client", *(escape(name) for name, _ in columns)]
    return f'<div class="large">{table(header, rows)}</div>'


def _against(block: Block) -> tuple[Callable[[Summary], str], str]:
    """Return how a difference is named, and what it is taken from: the one base of all, or each its own."""
    bases = {one.base for one in block.shown if one.base}
    if len(bases) == 1:
        base = bases.pop()
        return lambda one: one.label, base if len(base) <= LONGEST_BASE else "the base"
    return lambda one: f"{one.label} − {one.base}", "the base"


def _panels(
    place: Place, name: str, shown: Mapping[str, tuple[str, Gain]], label: str, title: str, caption: str
) -> str:
    """Add a figure with a panel for each method, in two widths where there are many."""
    narrow = gains(shown, place.palette, label)
    if len(shown) < 3:
        return place.add(name, narrow, title, caption)
    return place.add(name, gains(shown, place.palette, label, wide=True), title, caption, narrow)


def _final(place: Place) -> Iterator[str]:
    if len(place.shown) > 1:
        rows = [
            bars.Bar(
                one.label, per_cent(one.quantities["final"]), place.colour(one), one.quantities["final"],
                found_in.finals(one, place.on),
            )
            for one in place.shown
        ]  # fmt: skip
        caption = place.spread("Bar: mean over seeds; whisker: one standard deviation; points: the seeds.")
        yield place.add("final", bars.bars(rows), "Accuracy after the last round", caption)
    named, base = _against(place.block)
    for quantity, name, title, what in (
        ("final", "differences", "Paired differences after the last round", ""),
        ("mean", "differences-mean", "Paired differences in the mean of all rounds", ""),
        (
            "equal_seconds", "differences-equal-seconds", "Beside its base at the same seconds",
            "Accuracy after a round less that of the base when it had spent as long: mean over the rounds that end "
            "within the base's seconds. ",
        ),
    ):  # fmt: skip
        pairs = [
            (named(one), place.colour(one), one.differences[quantity])
            for one in place.shown
            if quantity in one.differences
        ]
        if pairs:
            interval = any(difference.low is not None for _, _, difference in pairs)
            caption = f"{what}Dot: mean of the differences on the same seeds" + (
                "; bar: its 95 % interval by Student's\u00a0t." if interval else ". One seed: no interval."
            )
            yield place.add(name, bars.forest(pairs, f"points above {base}"), title, caption)


def _costs(place: Place) -> Iterator[str]:
    if len(place.shown) < 2 or max(len(one.curve) for one in place.shown) < 2:
        return
    y = Axis("accuracy in %", per_cent=True)
    for name, label in (
        ("megabytes", "MB in both directions"),
        ("seconds", "seconds of training, fusing and refining"),
    ):
        shown = [
            Line.of(
                one.label, place.key(one), [getattr(band, name) for band in one.curve],
                [band.accuracy for band in one.curve], one.base,
            )
            for one in place.shown
        ]  # fmt: skip
        if max(line.x[-1] for line in shown) > 0:
            x = Axis(label, begins_at_zero=True)
            caption = "Spent until a round, and the accuracy after it; means over seeds."
            if place.palette.tells:
                figure = lines(shown, place.palette, x, y)
            else:
                figure = frontier(shown, x, y)
                caption += " Steps: the best for so much, give or take 5 %; grey: every method."
            yield place.add(name, figure, f"Accuracy against {name}", caption)


def _refinement(place: Place) -> Iterator[str]:
    found = {one.label: (place.key(one), own) for one in place.shown if (own := found_in.gain(one, place.on))}
    if found:
        caption = "Line: accuracy of the refined model minus that of the fused one. "
        caption += place.spread("Mean over seeds; band: one standard deviation.")
        if any(own.room for _, own in found.values()):
            samples = max(run.config.eval.ensemble_samples for run in place.block.runs)
            both = ", as the fused model it is compared with" if all(own.alike for _, own in found.values()) else ""
            caption += (
                " Dashed: what the best of the cohort's ensembles would have given, in the rounds in which they were "
                f"measured, on at most {samples:,} samples{both}."
            )
        yield _panels(place, "refinement", found, "points above the fused model", "Refined minus fused", caption)


# Clients and classes


def _clients(place: Place) -> Iterator[str]:
    if (held := found_in.clients(place.block)) is not None:
        figure = partition_figure(held.counts, held.class_names, width=COLUMN)
        caption = f"Data seed {held.seed}, {held.protocol}: each client's training samples, and how many of each class."
        yield place.add("clients", figure, "Clients and classes", caption)


def _classes(place: Place) -> Iterator[str]:
    shown = [(one.label, one.per_class) for one in place.shown if any(one.per_class)]
    if shown:
        names = found_in.class_names(place.block.runs[0], max(len(own) for _, own in shown))
        yield place.add("classes", bars.cells(shown, names), "Accuracy by class", "Final model, mean over seeds, in %.")


def _worst(place: Place) -> Iterator[str]:
    for name, (title, beside) in WORST.items():
        quantity = f"worst_decile_{name}"
        rows = [
            bars.Bar(
                one.label, per_cent(one.quantities[quantity]), place.colour(one), one.quantities[quantity],
                beside=found_in.on_own_samples(one) if name == "own_samples" else one.quantities["final"].mean,
            )
            for one in place.shown
            if quantity in one.quantities
        ]  # fmt: skip
        if rows:
            caption = f"Dot: mean of the lowest tenth of the clients after the last round; tick: {beside}. "
            caption += place.spread("Mean over seeds; whisker: one standard deviation.")
            yield place.add(f"worst-clients-{name.replace('_', '-')}", bars.dots(rows), title, caption)


# Refinement


def _losses(place: Place) -> Iterator[str]:
    found = {one.label: (place.key(one), found_in.losses(one)) for one in place.shown}
    for metric in dict.fromkeys(metric for _, own in found.values() for metric in own):
        shown = [
            Line.of(label, key, list(own[metric]), list(own[metric].values()))
            for label, (key, own) in found.items()
            if metric in own and any(one.mean for one in own[metric].values())
        ]
        if shown and max(len(line.x) for line in shown) > 1:
            refinement, quantity = metric
            label = quantity.replace("_", " ")
            share = quantity.endswith("accuracy") or quantity == "accepted"
            figure = lines(shown, place.palette, Axis("round", whole=True), Axis(label, per_cent=share))
            caption = f"{METRICS[quantity]}; mean over a refinement." if quantity in METRICS else ""
            file = "losses-" + "".join(letter if letter.isalnum() else "-" for letter in f"{refinement}-{quantity}")
            yield place.add(file, figure, f"{refinement}: {label}", caption)


def _samples(content: Content, figures: Figures) -> str:
    found, left_out = _that_fit(content)
    if not found:
        return ""
    shown: list[str] = []
    missing: dict[str, None] = {}
    for block in content.blocks:
        for one in block.shown:
            if (own := found.get((block.name, one.label))) is None:
                continue
            run, samples = own
            if samples.missing:
                missing[f"Real samples are left out: {samples.missing}."] = None
            model = f", model {samples.model}" if samples.model else ""
            where = f"{block.title}. " if block.title else ""
            caption = f"{where}Seed {run.config.seed.train}, round {samples.round}{model}."
            figure = grids.samples(samples)
            shown.append(figures.add(f"samples-{len(shown) + 1}", figure, one.label, caption, of=block.title))
    first = (
        "The generator's samples by class, as the student saw them, in the data's own scale. "
        "Only a simulation can show real samples beside them, here beside a table's first: no server has these."
    )
    rest = [f"There is no room for those of {left_out} more methods."] if left_out else []
    return _notes([first, *missing, *rest]) + f'<div class="figures">{"".join(shown)}</div>'


def _that_fit(content: Content) -> tuple[dict[tuple[str, str], tuple[RunData, ClassSamples]], int]:
    """Return by table and method the samples for which there is room, and how many others have a generator.

    One of each table has its turn, with real samples beside it, then a second of each, and so on.
    """
    by_table = [
        [
            (block.name, one.label, run)
            for one in block.shown
            if (run := next(filter(has_generator, one.group.whole.values()), None)) is not None
        ]
        for block in content.blocks
    ]
    turns = [one for turn in zip_longest(*by_table) for one in turn if one is not None]
    size = {(name, label): _values_of_each_class(run) for name, label, run in turns}
    firsts = [own[0][:2] for own in by_table if own]

    def needed(made: int) -> int:
        return sum(made * of_all for of_all in size.values()) + sum(made // 2 * size[first] for first in firsts)

    made = next((made for made in MADE if needed(made) <= SAMPLE_VALUES), MADE[-1])
    found: dict[tuple[str, str], tuple[RunData, ClassSamples]] = {}
    left, with_real, left_out = SAMPLE_VALUES, set[str](), 0
    for name, label, run in turns:
        beside = 0 if name in with_real else made // 2
        if (cost := (made + beside) * size[name, label]) > left:
            left_out += 1
        elif (samples := class_samples(run, SAMPLE_CLASSES, made, beside)) is not None:
            found[name, label] = run, samples
            left -= cost
            with_real.add(name)
    return found, left_out


def _values_of_each_class(run: RunData) -> int:
    """Return the pixels times channels of one image of every class that is shown."""
    source, data = source_of(run.config.data.name), run.config.data
    return min(len(data.classes or source.class_names), SAMPLE_CLASSES) * math.prod(source.shape)


# How it was run


def _time(place: Place) -> Iterator[str]:
    shown = [(one.label, place.colour(one), found_in.phases(one)) for one in place.shown]
    caption = "Mean over seeds. The seconds in the table of results are those without evaluation."
    yield place.add("time", bars.stacks(shown), "Seconds of a run by phase", caption)


def _configuration(content: Content) -> str:
    keys, rows = words.differing_keys(content)
    differing = ""
    if keys:
        said = [[escape(cell) for cell in row] for row in rows]
        differing = "<h3>Where they differ</h3>" + table(["", *map(escape, keys)], said)
    tables = "".join(
        f"<div>{f'<h3>[{escape(name)}]</h3>' if name else ''}{facts(own.items())}</div>"
        for name, own in words.shared_keys(content.runs).items()
    )
    note = (
        "A method's table counts for the runs that use it. Methods that nothing here uses are left out, and so are "
        "keys that are not set; each run's config.toml has every key."
    )
    return f'{differing}<h3>Where they agree</h3>{_notes([note])}<div class="keys">{tables}</div>'


def _environment(content: Content) -> str:
    found = words.environments(content.runs)
    return facts(found) if found else ""
