"""The report as a browser shows it: on a phone, in the dark, printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import NAMES, Chromium, chromium, executable

from invented import big_report

PHONE, DESK = 390, 1280
RIGHTMOST = """(() => {
    const texts = [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect());
    return Math.max(...texts.filter(box => box.width).map(box => box.right));
})()"""
SMALLEST = """(() => {
    const shown = [...document.querySelectorAll("svg text")].filter(text => text.getBoundingClientRect().width);
    const scale = text => Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
    return Math.min(...shown.map(text => parseFloat(getComputedStyle(text).fontSize) * scale(text)));
})()"""
WIDE = "document.querySelector('.wide').getBoundingClientRect().width"
NARROW = "document.querySelector('.narrow').getBoundingClientRect().width"


@pytest.fixture(scope="module")
def page() -> Path:
    return big_report()[1]


@pytest.fixture(scope="module")
def tab() -> Iterator[Chromium]:
    if executable() is None:
        missing = f"no browser here: none of {', '.join(NAMES)} is on the path (apt-get install chromium)"
        if os.environ.get("FEDSTILL_BROWSER") == "needed":
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium() as tab:
        yield tab


@pytest.mark.parametrize("width", [320, PHONE, 700, DESK])
def test_the_page_does_not_scroll_sideways(tab: Chromium, page: Path, width: int) -> None:
    tab.look(width)
    tab.open(page)
    assert tab.value("document.documentElement.clientWidth") == width
    assert tab.value("document.documentElement.scrollWidth") == width
    assert tab.value(RIGHTMOST) <= width
    assert (tab.value(WIDE) == 0) == (width <= 700)
    assert (tab.value(NARROW) == 0) == (width > 700)


def test_letters_in_figures_can_be_read_on_a_phone(tab: Chromium, page: Path) -> None:
    tab.look(PHONE)
    tab.open(page)
    assert tab.value(SMALLEST) >= 8


def test_nothing_is_asked_for_and_nothing_complained_of(tab: Chromium, page: Path) -> None:
    tab.look(PHONE)
    del tab.requests[:], tab.complaints[:]
    tab.open(page)
    asked = [request for request in tab.requests if not request.startswith("data:")]
    assert asked == [page.resolve().as_uri()]
    assert tab.complaints == []
    assert tab.value("document.compatMode") == "CSS1Compat"


def test_light_and_dark_differ(tab: Chromium, page: Path) -> None:
    strokes = "[...document.querySelectorAll('#curves .narrow path')].map(path => getComputedStyle(path).stroke)"
    coloured = "rgb => Math.max(...rgb.match(/\\d+/g)) - Math.min(...rgb.match(/\\d+/g)) > 60"  # grids are grey
    line = f"{strokes}.filter(stroke => stroke != 'none').find({coloured})"
    paper = "getComputedStyle(document.body).backgroundColor"
    shown = []
    for dark in (False, True):
        tab.look(PHONE, dark=dark)
        tab.open(page)
        shown.append((tab.value(line), tab.value(paper), tab.screenshot(PHONE, 2000)))
    for light, dark in zip(*shown, strict=True):
        assert light != dark


def test_it_is_printed_on_white_a_part_on_its_own_page(tab: Chromium, page: Path) -> None:
    tab.look(DESK, dark=True)
    tab.open(page)
    parts = tab.value("document.querySelectorAll('section').length")
    tab.ask("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    tab.ask("Emulation.setEmulatedMedia", media="")
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= parts
