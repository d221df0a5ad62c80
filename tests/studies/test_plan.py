"""The study file: the runs that follow from it, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedstill.config import load_config
from fedstill.errors import InputError
from fedstill.presets import preset
from fedstill.studies import Study, sweep
from fedstill.studies.plan import folder_of, slug

STUDIES = Path(__file__).parents[2] / "studies"
STUDY = """
title = "Three axes"
seeds = [0, 1]
[keys]
"train.rounds" = 2
[grid]
"data.beta" = [0.1, 0.3]
[[variant]]
name = "FedAvg"
keys = { method = "fedavg" }
[[variant]]
name = "FedAvg+FedFTG"
base = "FedAvg"
keys = { method = "fedavg+fedftg" }
grid = { "fedftg.lambda_md" = [0, 0.3, 1] }
[[setting]]
name = "Few Rounds"
[[setting]]
name = "many rounds"
keys = { "train.rounds" = 9 }
only = ["FedAvg+FedFTG"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        Study.load(written(folder, text), *overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# The runs


def test_every_run_stands_there_once_seed_by_seed(tmp_path: Path) -> None:
    cells = Study.load(written(tmp_path, STUDY)).cells
    # Few rounds: 2 points x (1 + 3); many rounds: 2 points x 3.
    assert len(cells) == 2 * (2 * (1 + 3) + 2 * 3)
    assert [cell.seed for cell in cells] == [0] * 14 + [1] * 14
    assert [cell.directory.as_posix() for cell in cells[:6]] == [
        "few-rounds/beta-0.1/fedavg/seed-0",
        "few-rounds/beta-0.1/fedavg-fedftg-lambda_md-0/seed-0",
        "few-rounds/beta-0.1/fedavg-fedftg-lambda_md-0.3/seed-0",
        "few-rounds/beta-0.1/fedavg-fedftg-lambda_md-1/seed-0",
        "few-rounds/beta-0.3/fedavg/seed-0",
        "few-rounds/beta-0.3/fedavg-fedftg-lambda_md-0/seed-0",
    ]
    assert len({cell.directory for cell in cells}) == len(cells)


def test_a_run_has_its_configuration(tmp_path: Path) -> None:
    cells = {cell.directory.as_posix(): cell for cell in Study.load(written(tmp_path, STUDY)).cells}
    cell = cells["many-rounds/beta-0.3/fedavg-fedftg-lambda_md-0.3/seed-1"]
    keys = ["train.rounds=9", "data.beta=0.3", "method=fedavg+fedftg", "fedftg.lambda_md=0.3"]
    assert cell.config == load_config(None, [*keys, "seed.data=1", "seed.train=1"], preset("digits"))
    assert cell.label == "many rounds, FedAvg+FedFTG, beta=0.3, lambda_md=0.3, seed 1"
    assert cells["few-rounds/beta-0.1/fedavg/seed-0"].config.train.rounds == 2


def test_what_study_json_says_of_a_run(tmp_path: Path) -> None:
    cells = Study.load(written(tmp_path, STUDY)).cells
    assert cells[1].record() == {
        "setting": "Few Rounds",
        "point": {"data.beta": 0.1, "fedftg.lambda_md": 0},
        "variant": "FedAvg+FedFTG",
        "base": "FedAvg",
        "seed": 0,
        "directory": "few-rounds/beta-0.1/fedavg-fedftg-lambda_md-0/seed-0",
    }
    # The base is not among the variants of this setting.
    assert cells[13].setting == "many rounds"
    assert cells[13].base is None


def test_an_empty_study_is_the_default_run(tmp_path: Path) -> None:
    (cell,) = Study.load(written(tmp_path, "")).cells
    assert cell.config == load_config(base=preset("digits"))
    assert (cell.directory.as_posix(), cell.variant, cell.label) == ("seed-0", "run", "run, seed 0")
    assert Study.load(tmp_path / "study.toml").title == "study"


def test_keys_may_be_nested(tmp_path: Path) -> None:
    quoted = '[grid]\n"data.beta" = [0.1, 0.3]\n[keys]\n"local.lr" = 0.2\n"fedftg.mode" = "tuned"\n'
    nested = "[grid]\ndata.beta = [0.1, 0.3]\n[keys]\nlocal.lr = 0.2\n[keys.fedftg]\nmode = 'tuned'\n"
    one, other = (Study.load(written(tmp_path, text)).cells for text in (quoted, nested))
    assert one == other
    assert one[0].config.fedftg.mode == "tuned"


def test_where_configurations_start(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('method = "scaffold"\n[model]\nname = "cnn"\nwidth = 5\n')
    text = 'config = "mine.toml"\n[[setting]]\nname = "a"\n[[setting]]\nname = "b"\npreset = "digits"\n'
    cells = Study.load(written(tmp_path, text)).cells
    assert [(cell.config.method, cell.config.model[0].width) for cell in cells] == [
        ("scaffold", 5),
        ("fedavg+fedftg", 16),
    ]
    # A preset's width says nothing about another architecture; a configuration of one's own is meant as it stands.
    (cell,) = Study.load(written(tmp_path, "keys = { model.name = 'mlp' }")).cells
    assert (cell.config.model[0].name, cell.config.model[0].width) == ("mlp", None)


def test_what_a_seed_sets(tmp_path: Path) -> None:
    text = "seeds = [3, 4]\nseed_keys = ['seed.train']\nkeys = { seed.data = 7 }"
    cells = Study.load(written(tmp_path, text)).cells
    assert [(cell.config.seed.data, cell.config.seed.train) for cell in cells] == [(7, 3), (7, 4)]


def test_overrides_are_for_every_run(tmp_path: Path) -> None:
    cells = Study.load(written(tmp_path, STUDY), "local.epochs=1", "model.width=4").cells
    assert {(cell.config.local.epochs, cell.config.model[0].width) for cell in cells} == {(1, 4)}


def test_names_of_folders() -> None:
    assert slug("../FedAvg + FedFTG, (paper)") == "fedavg-fedftg-paper"
    assert slug("größer als 1e-5") == "größer-als-1e-5"
    assert folder_of({"data.beta": 0.1, "data.clients": 10}) == "beta-0.1-clients-10"
    assert folder_of({"fedftg.mode": "paper", "moon.mode": "code"}) == "fedftg.mode-paper-moon.mode-code"
    assert folder_of({"x.y": -0.5}) == "y-minus-0.5"
    assert folder_of({"x.y": [1, 2], "x.z": True}) == "y-1-2-z-true"
    assert folder_of({}) == ""
    long = [slug("a" * 300 + end) for end in ("b", "c")]
    assert max(map(len, long)) <= 100
    assert long[0] != long[1]


# What is refused

TWO = "[[variant]]\nname = 'a'\nkeys = { method = 'fedavg' }\n[[variant]]\nname = 'b'\nkeys = { method = 'scaffold' }\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("titel = 'x'\n", ":1: unknown key 'titel', did you mean 'title'?"),
        ("[[variant]]\nnme = 'x'\n", ":2: unknown key 'variant.nme', did you mean 'variant.name'?"),
        ("[[variant]]\nbase = 'x'\n", "variant.name: field required"),
        ("seeds = []\n", ":1: seeds: "),
        ("seeds = [-1]\n", ":1: seeds: "),
        ("seeds = [0.5]\n", ":1: seeds: "),
        ("seeds = 3\n", ":1: seeds: "),
        ("[grid]\ndata.beta = 0.1\n", "grid.data.beta: input should be a valid list, not 0.1"),
        ("[grid]\ndata.beta = []\n", "grid.data.beta: list should have at least 1 item"),
        ("[grid]\ndata.bta = [0.1]\n", ": [grid]: unknown key 'data.bta', did you mean 'data.beta'?"),
        ("[keys]\nbeta = 0.1\n", ": [keys]: unknown key 'beta', did you mean 'data.beta'?"),
        ("[keys]\ndata.clients = 2\n[grid]\ndata = [{ beta = 0.1 }, { beta = 0.2 }]\n",
         ": [grid]: 'data' is a table; name its keys one by one, such as 'data.name'"),
        ("[[variant]]\nname = 'x'\ngrid = { model.0 = [{ name = 'mlp' }] }\n", "'x': grid: 'model.0' is a table"),
        ("seed_keys = ['seed']\n", ": seed_keys: 'seed' is a table"),
        ("[search]\ntrials = 2\n[search.space]\nlocal = [{ lr = 0.1 }]\n", ": [search]: 'local' is a table"),
        ("[grid]\ndata.root = [2020-01-01]\n", "grid.data.root: a date or a time is no value of any key; put"),
        ("[search]\ntrials = 1\n[search.space]\ndata.root = [10:00:00]\n", "a date or a time is no value of any key"),
        *((f"[[variant]]\nname = '{name}'\n", f"/seed-0: a results folder has a file or folder '{name}' of its own")
          for name in ("lock", "study.toml", "study.json", "study.toml.x", "search.json", "report")),
        (f"[[variant]]\nname = '{'字' * 90}'\n", "a folder's name has 255 bytes at most, and this one 270; choose"),
        ("seed_keys = ['sed.data']\n", ": seed_keys: unknown key 'sed.data', did you mean 'seed.data'?"),
        ("[[variant]]\nname = 'x'\nkeys = { methd = 'fedavg' }\n", "[[variant]] 'x': unknown key 'methd'"),
        ("[[variant]]\nname = 'x'\ngrid = { data.bta = [1] }\n", "[[variant]] 'x': unknown key 'data.bta'"),
        ("[[setting]]\nname = 'x'\nkeys = { data.bta = 1 }\n", "[[setting]] 'x': unknown key 'data.bta'"),
        ("[keys]\ndata.beta = 0\n", ": seed-0: data.beta: input should be greater than 0, not 0"),
        ("[keys]\nmethod = 'fedagv'\n", ": seed-0: unknown method 'fedagv', did you mean 'fedavg'?"),
        ("[grid]\nlocal.lr = [0.1, 'x']\n", ": lr-x/seed-0: local.lr: input should be a valid number"),
        (TWO + "base = 'c'\n", "[[variant]] 'b': base: unknown variant 'c'"),
        (TWO + "base = 'b'\n", "[[variant]] 'b': base: it is the variant itself"),
        (TWO.replace("[[variant]]\nname = 'b'", "grid = { data.beta = [1] }\n[[variant]]\nbase = 'a'\nname = 'b'"),
         "[[variant]] 'b': base: 'a' has a grid of its own"),
        (TWO + "[[setting]]\nname = 's'\nonly = ['aa']\n", "[[setting]] 's': unknown variant 'aa'"),
        (TWO + "[[setting]]\nname = 's'\nonly = []\n", "no setting has a variant"),
        (TWO.replace("'b'", "'A'"), "two runs would have the directory a/seed-0: 'a, seed 0' and 'A, seed 0'"),
        (TWO.replace("scaffold", "fedavg"), "'a, seed 0' and 'b, seed 0' have the same configuration"),
        ("seeds = [1, 1]\n", "two runs would have the directory seed-1"),
        ("seeds = [1, 2]\nseed_keys = []\n", "have the same configuration"),
        ("[grid]\ndata.beta = [1.0, 1.0]\n", "two runs would have the directory beta-1.0/seed-0"),
        ("[grid]\ndata.beta = [0.1, 0.2]\n[[variant]]\nname = 'x'\nkeys = { data.beta = 1 }\n",
         "data.beta is an axis of the study, and something else sets it too"),
        ("[keys]\nseed.train = 5\n", "seed.train is an axis of the study, and something else sets it too"),
        ("preset = 'digits'\nconfig = 'x.toml'\n", "the study: preset and config do not go together"),
        ("preset = 'digit'\n", "the study: unknown preset 'digit', did you mean 'digits'?"),
        ("[[setting]]\nname = 's'\nconfig = 'x.toml'\n", "x.toml: there is no such file"),
        ("[keys]\n'data.beta' = 1\ndata.beta = 2\n", "'data.beta' stands there twice"),
        ("title = \n", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    line = refusal(tmp_path, text)
    assert line.startswith(str(tmp_path / "study.toml"))
    assert says in line


def test_overrides_that_cannot_work_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "", "data.bta=1") == "unknown key 'data.bta', did you mean 'data.beta'?"
    assert "is not an override" in refusal(tmp_path, "", "data.beta")
    assert "data.beta is an axis of the study" in refusal(tmp_path, STUDY, "data.beta=1")
    assert "have the same configuration" in refusal(tmp_path, TWO, "method=fedavg")
    with pytest.raises(InputError, match="not with a ready Study"):
        sweep(Study.load(written(tmp_path, "")), "data.beta=1")
    with pytest.raises(InputError, match="there is no such file"):
        Study.load(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ("trials = 2\n", "search.space: field required"),
        ("trials = 0\n[search.space]\nlocal.lr = [0.1]\n", "search.trials: "),
        ("trials = 2\nspace = {}\n", "search.space: "),
        (
            "trials = 2\n[search.space]\nlocal.lr = 0.1\n",
            "a list of values or {low = ..., high = ...} should stand here",
        ),
        ("trials = 2\n[search.space]\nlocal.lr = []\n", "list should have at least 1 item"),
        ("trials = 2\n[search.space]\nlocal.lr = { low = 2, high = 1 }\n", "low = 2 is not below high = 1"),
        ("trials = 2\n[search.space]\nlocal.lr = { low = 0, high = 1, log = true }\n", "no low = 0"),
        ("trials = 2\n[search.space]\nlocal.lr = { low = 0.1, hihg = 1 }\n", "search.space.local.lr"),
        ("trials = 2\n[search.space]\nlocal.rl = [1]\n", "[search]: unknown key 'local.rl', did you mean 'local.lr'?"),
        ("trials = 2\n[search.space]\nlocal.lr = { low = 0, high = 1 }\n", "lr-0.0/seed-0: local.lr: input should be"),
        ("trials = 2\n[search.space]\nlocal.epochs = { low = 1, high = 2.5 }\n", "local.epochs takes whole numbers"),
        ("trials = 2\n[search.space]\nseed.data = [1]\n", "seed.data is an axis of the study"),
        ("trials = 2\n[search.space]\nlocal.lr = [1]\n" + TWO, "a search has one variant"),
    ],
)
def test_a_search_that_cannot_work_is_refused(tmp_path: Path, search: str, says: str) -> None:
    assert says in refusal(tmp_path, f"[search]\n{search}")


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda file: file.name)
def test_a_study_of_this_repository_can_be_read(file: Path) -> None:
    seeds = {cell.config.seed.data for cell in Study.load(file).cells}
    assert seeds
    if file.name == "digits.toml":  # the README says what it is
        assert len(Study.load(file).cells) == 9
        assert seeds == {0, 1, 2}
