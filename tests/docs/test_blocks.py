"""Every code block of the documentation is run, or says why not; what is not run is still read."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import ROOT, Block, Reader, WrongBlock, blocks_of, chains, check_unrun

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [chain for page in PAGES for chain in chains(blocks_of(page))]
FIRST_STEPS = ["README.md", "docs/index.md", "docs/studies.md", "docs/add-a-method.md", "docs/bring-your-own.md"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_a_block_is_what_it_says(block: Block) -> None:
    block.check()
    if block.not_run is not None:
        check_unrun(block)


@pytest.mark.parametrize("chain", RUN, ids=lambda chain: chain[0].where)
def test_a_block_runs(chain: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Reader(tmp_path, monkeypatch).follow(chain)


@pytest.mark.parametrize("page", FIRST_STEPS)
def test_first_steps_are_run(page: str) -> None:
    """What a newcomer does first is really done here: its first commands are not marked away."""
    first = next(block for block in blocks_of(ROOT / page) if block.language == "sh" and "fedstill " in block.text)
    assert first.not_run is None


def page_with(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_what_is_read_of_a_page(tmp_path: Path) -> None:
    text = (
        "# A\n<!-- part -->\n<!-- continues -->\n\n```toml\n# a.toml\nx = 1\n```\n- b\n\n    ```sh\n    ls\n    ```\n"
    )
    text += "```\nout\n```\n"
    first, second, third = blocks_of(page_with(tmp_path, text))
    assert (first.line, first.language, first.file, first.continues) == (5, "toml", "a.toml", True)
    assert sorted(first.markers) == ["continues", "part"]
    assert (second.language, second.text, second.markers, second.file) == ("sh", "ls\n", (), None)
    assert third.language == ""


def test_a_block_goes_on_only_where_it_says_so(tmp_path: Path) -> None:
    block = "```python\npass\n```\n"
    unrun = f"<!-- not run: hours -->\n{block}"
    blocks = blocks_of(page_with(tmp_path, block + block + unrun + "<!-- continues -->\n" + block))
    assert [len(chain) for chain in chains(blocks)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\nfedstill methods\n```", "language 'bash'"),
        ("<!-- not run -->\n```sh\nls\n```", "marker 'not run'"),
        ("<!-- not run: -->\n```sh\nls\n```", "marker 'not run:'"),
        ("<!-- not run: because -->\n```sh\nls\n```", "marker 'not run: because'"),
        ("<!-- continue -->\n```sh\nfedstill methods\n```", "marker 'continue'"),
        ("```\nfedstill run\n```", "a command in a block of output"),
    ],
)
def test_wrong_markers_are_found(text: str, problem: str, tmp_path: Path) -> None:
    (block,) = blocks_of(page_with(tmp_path, text))
    with pytest.raises(WrongBlock, match=problem):
        block.check()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```sh\nmake test\n```", "'make test' cannot be run: it needs a marker"),
        ("```sh\nfedstill show nonsense\n```", "exit code 2"),
        ("```sh\nfedstill presets   # exit code 1\n```", "exit code 0"),
        ("```python\nraise OSError('not this')\n```", "not this"),
        ("```python\nx = 1\n```\n```python\nx\n```", "name 'x' is not defined"),
        ("```python\n# mine.py\nx = 1\n```", "no block that continues it uses mine.py"),
        ("```toml\ntrain.round = 1\n```", "unknown key 'train.round'"),
        ('```toml\nseeds = [0]\nkeys = { "train.round" = 1 }\n```', "train.round"),
        ("<!-- part -->\n```toml\nx =\n```", "Invalid value"),
    ],
)
def test_what_does_not_work_is_found(text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        for number, chain in enumerate(chains(blocks_of(page_with(tmp_path, text)))):
            folder = tmp_path / str(number)
            folder.mkdir()
            Reader(folder, monkeypatch).follow(chain)

    with pytest.raises((Exception, AssertionError), match=problem):
        read()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```sh\nfedstill ruin\n```", "no command ruin"),
        ("```sh\nfedstill run --ot runs/x\n```", "fedstill run --ot"),
        ("```sh\nfedstill run train.round=3\n```", "no key train.round"),
        ("```sh\nmake nonsense\n```", "no target nonsense"),
        ("```sh\nX=1 python studies/nonsense.py run\n```", "no studies/nonsense.py"),
        ("```sh\nX=1 fedstill methods && fedstill sweep studies/nonsense.toml\n```", "no studies/nonsense.toml"),
        ("```python\nx = (\n```", "never closed"),
        ("```toml\nx =\n```", "Invalid value"),
    ],
)
def test_what_is_not_run_is_read(text: str, problem: str, tmp_path: Path) -> None:
    (block,) = blocks_of(page_with(tmp_path, "<!-- not run: hours -->\n" + text))
    block.check()
    with pytest.raises((Exception, AssertionError), match=problem):
        check_unrun(block)


def test_a_reader_gets_what_the_page_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
```python
# nets.py
answer = 42
```
<!-- continues -->
```sh
export PYTHONPATH=.
fedstill show digits > mine.toml   # a file
python nets.py
```
<!-- continues -->
```python
import pathlib, nets
found = nets.answer, "rounds" in pathlib.Path("mine.toml").read_text()
```
"""
    (chain,) = chains(blocks_of(page_with(tmp_path, text)))
    reader = Reader(tmp_path, monkeypatch)
    reader.follow(chain)
    assert reader.names["found"] == (42, True)
