"""The site builds without a broken link and fetches nothing from elsewhere; the links of the other pages hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(https?:)?//|<link[^>]*rel="?(?:stylesheet|preconnect|icon)[^>]*//"""
)


def test_the_site_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="MkDocs is not installed; make setup installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    told = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page.name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.parametrize("text", ['<script src="https://a.b/c.js">', '<link href=//a.b rel="stylesheet" x="//a">'])
def test_what_is_fetched_is_seen(text: str) -> None:
    assert FETCHED.search(text) is not None


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_pages_outside_the_site(name: str) -> None:
    targets = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        file, _, anchor = target.partition("#")
        if file.startswith("https:"):
            continue
        assert (ROOT / file).is_file(), f"{name}: {target}"
        headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, (
            target
        )
