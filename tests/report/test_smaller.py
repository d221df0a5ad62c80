"""A page with fewer letters: what its drawings show stays the same."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from io import BytesIO
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedstill.report.html.smaller import base36, smaller
from fedstill.report.html.style import rounded

LINE = "fill:none;stroke:var(--grid)"
ONE = (
    f'<svg viewBox="0 0 9 9"><g><g/><g><defs><path id="curves-m1" d="M0 0l1 1" style="{LINE}"/></defs></g>'
    f'<g clip-path="url(#curves-p2)"><use href="#curves-m1" x="3" style="{LINE}"/></g></g>'
    '<clipPath id="curves-p2"><rect/></clipPath><text style="fill:red">a &lt;g&gt; b</text></svg>'
)


def page(*svgs: str) -> str:
    return "".join(f'<p id="curves-m1" style="{LINE}"><g>outside</g></p>{svg}' for svg in svgs)


def test_it_has_the_same_elements_and_what_stands_outside_is_left_alone() -> None:
    html, css = smaller(page(ONE, ONE.replace("curves", "other")))
    assert html.count(f'<p id="curves-m1" style="{LINE}"><g>outside</g></p>') == 2
    first, second = (ElementTree.fromstring(svg) for svg in re.findall("<svg .*?</svg>", html))
    for drawing in (first, second):
        assert [part.tag for part in drawing.iter()] == ["svg", "defs", "path", "g", "use", "clipPath", "rect", "text"]
        path, group, use, clip = (drawing.find(f".//{tag}") for tag in ("path", "g", "use", "clipPath"))
        assert path is not None and group is not None and use is not None and clip is not None  # noqa: PT018
        assert use.get("href") == f"#{path.get('id')}"
        assert group.get("clip-path") == f"url(#{clip.get('id')})"
        # The style of four elements is a class; the text's, with its red of two elements, is another.
        assert f".{path.get('class')}{{{LINE}}}\n" in css
        assert path.get("class") == use.get("class")
        assert drawing.find("text").text == "a <g> b"  # type: ignore[union-attr]
    ids = re.findall(r'<(?:path|clipPath) id="([^"]*)"', html)
    assert len(set(ids)) == 4
    assert css.count("\n") == 2


def test_a_shape_that_is_used_once_stands_where_it_is_used() -> None:
    shape = '<defs><path id="a" d="M0 0l1 1z"/></defs>'
    once = f'<svg >{shape}<g clip-path="url(#c)"><use xlink:href="#a" x="0" y="9" style="fill:red"/></g></svg>'
    html, _ = smaller(once)
    assert html == '<svg ><path d="M0 9l1 1z" style="fill:red" clip-path="url(#i1)"/></svg>'
    curve = smaller(once.replace("l1 1z", "C1 1 2 2 3 3"))[0]
    assert 'd="M0 0C1 1 2 2 3 3" transform="translate(0 9)"' in curve, "what is no steps is moved as a whole"
    twice = smaller(once.replace("</svg>", '<use xlink:href="#a" x="1" y="1"/></svg>'))[0]
    assert twice.count("<use") == 2
    assert twice.count("<defs>") == 1


def test_a_grid_is_one_path_with_its_labels_after_it() -> None:
    grid = "".join(f'<path d="M0 {y}l9 0" style="{LINE}"/><text x="0">{y}</text>' for y in (1, 2.5, 4))
    other = '<path d="M0 1l9 0" style="stroke:red"/><path d="M0 2l9 0l1 1" style="stroke:red"/>'
    html, css = smaller(f"<svg >{grid}{other}</svg>")
    assert '<path d="M0 1l9 0M0 2.5l9 0M0 4l9 0" class="s0"/>' in html
    assert re.findall(r"<text[^>]*>([^<]*)", html) == ["1", "2.5", "4"]
    assert html.count("<path") == 3, "another class, and lines with a bend, are others"
    assert f".s0{{{LINE}}}" in css


def test_marks_of_one_class_are_a_group_but_not_where_they_are_blended() -> None:
    shape = '<defs><path id="a" d="M0 0l1 1z"/></defs>'

    def marks(style: str) -> str:
        return "".join(f'<use xlink:href="#a" x="{x}" y="1" style="{style}"/>' for x in (1, 2))

    html, _ = smaller(f"<svg >{shape}{marks('fill:red')}{marks('opacity:0.5')}</svg>".replace("xlink:", ""))
    drawing = ElementTree.fromstring(html)
    group = drawing.find("g")
    assert group is not None
    assert [use.get("x") for use in group] == ["1", "2"]
    assert [use.get("class") for use in group] == [None, None]
    assert len([use for use in drawing if use.tag == "use"]) == 2


def test_what_is_neither_filled_nor_drawn_is_left_out() -> None:
    html, _ = smaller(
        '<svg ><path d="M0 0l1 1" style="fill:none"/><path d="M0 0l1 1" style="fill:none;stroke:red"/></svg>'
    )
    assert html.count("<path") == 1
    assert "stroke:red" in html


def test_a_style_that_stands_once_stays() -> None:
    html, css = smaller('<svg viewBox="0 0 1 1"><rect style="fill:red"/></svg>')
    assert html == '<svg viewBox="0 0 1 1"><rect style="fill:red"/></svg>'
    assert css == ""


@pytest.mark.parametrize("colours", [[(9, 9, 9, 255), (200, 200, 200, 0)], [(9, 80, 9, 255), (1, 2, 3, 128)]])
def test_pictures_keep_their_pixels(colours: list[tuple[int, int, int, int]]) -> None:
    picture, before = Image.new("RGBA", (40, 40)), BytesIO()
    for place in range(1600):
        picture.putpixel((place % 40, place // 40), colours[place * place % 7 % 2])
    picture.save(before, "PNG", compress_level=0)
    html, _ = smaller(f'<svg ><image href="data:image/png;base64,{b64encode(before.getvalue()).decode()}"/></svg>')
    found = re.search(r'base64,([^"]*)', html)
    assert found is not None
    after = b64decode(found[1])
    assert len(after) < len(before.getvalue()) / 4
    assert Image.open(BytesIO(after)).convert("RGBA").tobytes() == picture.tobytes()


def test_short_names() -> None:
    assert [base36(number) for number in (0, 9, 10, 35, 36, 36 * 36)] == ["0", "9", "a", "z", "10", "100"]


def test_rounded_steps_do_not_add_up() -> None:
    # Ten steps of 0.04: each is rounded from where the rounded ones have led, so that the end is at 0.4.
    path = "M 0 0 " + " ".join(f"L {0.04 * place:.6f} 1" for place in range(1, 11))
    found = re.search(r'd="([^"]*)"', rounded(f'<path d="{path}"/>', 1))
    assert found is not None
    steps = [float(x) for x in re.findall(r"l(-?[\d.]+)", found[1])]
    assert len(steps) == 10
    assert sum(steps) == pytest.approx(0.4)
