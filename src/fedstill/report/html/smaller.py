"""A page with many drawings in fewer letters: short ids, styles as classes, fewer elements, plain pictures."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Collection
from io import BytesIO
from itertools import count

from PIL import Image

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
Change = Callable[[str], str]


def smaller(html: str) -> tuple[str, str]:
    """Return a page's HTML and the CSS that its drawings now need beside their own.

    The drawings look the same. What stands outside ``svg`` elements is left alone.
    """
    ids: dict[str, str] = {}
    numbers = count()

    def short(name: str) -> str:
        return ids.setdefault(name, f"i{base36(next(numbers))}")

    html = in_drawings(
        html, lambda svg: with_plain_pictures(visible(without_empty_groups(in_place(with_ids(svg, short)))))
    )
    styles = Counter(style for svg in drawings(html) for style in re.findall(r' style="([^"]*)"', svg))
    often = [style for style, times in styles.most_common() if times > 1]
    classes = {style: f"s{base36(place)}" for place, style in enumerate(often)}

    def classed(svg: str) -> str:
        return re.sub(
            r' style="([^"]*)"', lambda found: f' class="{classes[found[1]]}"' if found[1] in classes else found[0], svg
        )

    css = "".join(f".{name}{{{style}}}\n" for style, name in classes.items())
    blended = {name for style, name in classes.items() if "opacity" in style}
    return in_drawings(html, lambda svg: together(joined(clipped(classed(svg))), blended)), css


def drawings(html: str) -> list[str]:
    """Return a page's ``svg`` elements."""
    return re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)


def in_drawings(html: str, change: Change) -> str:
    """Return a page with its ``svg`` elements changed."""
    return re.sub(r"<svg .*?</svg>", lambda found: change(found[0]), html, flags=re.DOTALL)


def with_ids(svg: str, short: Change) -> str:
    """Return a drawing with other ids, where they are given and where they are used."""
    svg = re.sub(r'(?<= id=")[^"]*', lambda found: short(found[0]), svg)
    return re.sub(r'(?<=href="#)[^"]*|(?<=url\(#)[^)]*', lambda found: short(found[0]), svg)


def in_place(svg: str) -> str:
    """Return a drawing in which a shape that is used once stands where it is used, as matplotlib's areas."""
    used = Counter(re.findall(r'href="#([^"]*)"', svg))
    shapes: dict[str, str] = {}

    def take(found: re.Match[str]) -> str:
        if used[found[1]] != 1 or "style=" in found[2]:
            return found[0]
        shapes[found[1]] = found[2]
        return ""

    def put(found: re.Match[str]) -> str:
        name, x, y, style = found.groups()
        if name not in shapes:
            return found[0]
        return f"<path{moved(shapes[name], float(x), float(y))}{style}/>"

    svg = re.sub(r'<defs>\s*<path id="([^"]*)"([^>]*)/>\s*</defs>', take, svg)
    return re.sub(r'<use [^>]*href="#([^"]*)" x="([^"]*)" y="([^"]*)"([^>]*)/>', put, svg)


def moved(attributes: str, x: float, y: float) -> str:
    """Return a path's attributes with its one beginning elsewhere, from which all else are steps; or a translation."""
    steps = re.fullmatch(r' d="M(-?[\d.]+) ?(-?[\d.]+)((?:l[-\d. ]*|z)*)"', attributes)
    if steps is None:
        return f'{attributes} transform="translate({x:g} {y:g})"'
    across, down = (f"{float(start) + by:.1f}".removesuffix(".0") for start, by in ((steps[1], x), (steps[2], y)))
    return f' d="M{across} {down}{steps[3]}"'


def clipped(svg: str) -> str:
    """Return a drawing in which a path that is alone in a clipped group is clipped itself."""
    return re.sub(r'<g( clip-path="[^"]*")><path((?:(?!clip-path|transform)[^>])*)/></g>', r"<path\2\1/>", svg)


def joined(svg: str) -> str:
    """Return a drawing in which straight lines of one class, with labels or without, are one path: a grid."""
    line, label = r'<path d="(M[-\d. ]+l[-\d. ]+)" class="(\w+)"/>', r"(?:<text [^>]*>[^<]*</text>)"

    def path(found: re.Match[str]) -> str:
        lines = "".join(line[0] for line in re.findall(line, found[0]))
        return f'<path d="{lines}" class="{found[2]}"/>' + "".join(re.findall(label, found[0]))

    following = rf'<path d="M[-\d. ]+l[-\d. ]+" class="\2"/>{label}?'
    return re.sub(rf"{line}{label}?(?:{following})+", path, svg)


def together(svg: str, blended: Collection[str]) -> str:
    """Return a drawing in which marks of one class, one after another, are a group that has the class.

    Not those of a class in ``blended``, where a group would be blended as a whole.
    """
    mark = r'<use href="[^"]*" x="[^"]*" y="[^"]*" class="(\w+)"/>'

    def group(found: re.Match[str]) -> str:
        name = found[1]
        inside = found[0].replace(f' class="{name}"', "")
        return found[0] if name in blended else f'<g class="{name}">{inside}</g>'

    return re.sub(mark + r'(?:<use href="[^"]*" x="[^"]*" y="[^"]*" class="\1"/>)+', group, svg)


def without_empty_groups(svg: str) -> str:
    """Return a drawing without groups that say nothing: their tags go, what they hold stays."""
    kept: list[bool] = []

    def tag(found: re.Match[str]) -> str:
        opens = found[0] != "</g>"
        if found[0].endswith("/>"):
            return ""
        if opens:
            kept.append(found[0] != "<g>")
            return found[0] if kept[-1] else ""
        return found[0] if kept.pop() else ""

    return re.sub(r"<g\b[^>]*>|</g>", tag, svg)


def visible(svg: str) -> str:
    """Return a drawing without paths that are neither filled nor drawn, as the grounds of matplotlib's axes."""
    return re.sub(r'<path [^>]*style="fill:none;?"/>', "", svg)


def with_plain_pictures(svg: str) -> str:
    """Return a drawing whose pictures have one channel of colour where they are grey, and are packed tightly."""

    def plain(found: re.Match[str]) -> str:
        before = b64decode(found[1])
        picture = Image.open(BytesIO(before)).convert("RGBA")
        red, green, blue, opacity = picture.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            picture = Image.merge("LA", (red, opacity))
        after = BytesIO()
        picture.save(after, "PNG", optimize=True)
        best = min(before, after.getvalue(), key=len)
        return f"data:image/png;base64,{b64encode(best).decode()}"

    return re.sub(r"data:image/png;base64,([^\"]*)", plain, svg)


def base36(number: int) -> str:
    """Return a number in digits and letters."""
    digits = LETTERS[number % 36]
    return digits if number < 36 else base36(number // 36) + digits
