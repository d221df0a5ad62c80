"""The configuration: what it refuses and how it says so, its overrides, its presets, its way to TOML and back."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from fedstill import presets
from fedstill.adam import Adam
from fedstill.config import Config, config_from, keys, load_config, nearest_key, to_toml
from fedstill.errors import InputError
from fedstill.methods.fedftg import MODES as FEDFTG_MODES
from fedstill.methods.fedftg import FedFTGSettings
from fedstill.methods.scaffold import ScaffoldSettings
from fedstill.settings import LARGEST_NUMBER
from fedstill.studies.plan import Study
from fedstill.weights import zeros_like


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    line = str(caught.value)
    assert "\n" not in line
    return line


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


# What is refused


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("data.clinets=3", "data.clients"),
        ("clients=3", "data.clients"),
        ("train.lr=0.1", "local.lr"),
        ("trian.rounds=3", "train.rounds"),
        ("local.epoch=3", "local.epochs"),
        ("fedftg.lambda_mdd=1", "fedftg.lambda_md"),
        ("methd=fedavg", "method"),
        ("sed.data=1", "seed.data"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(override: str, near: str) -> None:
    key = override.partition("=")[0]
    line = refusal(override)
    assert f"unknown key {key!r}" in line or f"unknown key {key.split('.')[0]!r}" in line
    table = near.split(".")[0]
    assert f"did you mean {near!r}?" in line or f"did you mean {table!r}?" in line


def test_a_key_like_no_other_gets_no_guess() -> None:
    line = refusal("xyzzy=1")
    assert line == "unknown key 'xyzzy'"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('method = "fedavg"\n\n[data]\nclinets = 3\n', 4, "unknown key 'data.clinets', did you mean 'data.clients'?"),
        ("# a comment\n[trian]\nrounds = 3\n", 2, "unknown key 'trian', did you mean 'train'?"),
        ("[train]\nrounds = 3\n[local]\n\nlr = 'fast'\n", 5, "local.lr: input should be a valid number, not 'fast'"),
        ("data.beta = 0\n", 1, "data.beta: input should be greater than 0, not 0"),
        ("[train]\nparticipation = 0.0\n", 2, "train.participation: input should be greater than 0, not 0.0"),
        ("[fedftg]\nmode = 'papre'\n", 2, "fedftg.mode: input should be 'paper', 'code' or 'tuned', not 'papre'"),
        ("[model]\nhidden = [10, 'a']\n", 2, "model.hidden: input should be a valid integer"),
        ("train = 5\n", 1, "train: "),
        ('method = "scaffold+fedftg"\nscaffold = "x"\n[fedftg]\nmode = "code"\n', 2, "scaffold: "),
        ('\ndata = { clients = "x" }\n', 2, "data.clients: input should be a valid integer"),
        ("\n\"data\" . 'beta' = 0\n", 2, "data.beta: input should be greater than 0"),
        ("[[model]]\n\n[[model]]\nhidden = [0.5]\n", 4, "model.hidden: input should be a valid integer"),
        ("[fedftg]\nteacher = 'class'\n", 1, "teacher = 'class' makes one target of all teachers"),
    ],
)
def test_a_file_is_refused_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = written(tmp_path, text)
    said = refusal(path=path)
    assert said.startswith(f"{path}:{line}: ")
    assert says in said


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[[variant]]\nname = "a"\n\n[[variant]]\nbase = "a"\n', 4, "variant.name: field required"),
        ('[[variant]]\nname = "a"\n[variant.grid]\nx = []\n[[variant]]\nname = "b"\n', 4, "variant.grid.x: list"),
        ('[grid]\n"data.beta" = []\n', 2, "grid.data.beta: list should have at least 1 item"),
    ],
)
def test_a_study_is_refused_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        Study.load(path)
    assert str(caught.value).startswith(f"{path}:{line}: {says}")


def test_an_overrides_own_fault_is_not_the_files(tmp_path: Path) -> None:
    path = written(tmp_path, "[data]\nclients = 3\n")
    assert refusal("data={clients = 'x'}", path=path).startswith("data.clients: ")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "\ufeffdata.clients = 3\n")).data.clients == 3


@pytest.mark.parametrize(
    "override",
    [
        "train.rounds=many",
        "train.rounds=2.5",
        "train.rounds=true",
        "local.lr='0.1'",
        "data.replay=1",
        "method=3",
        "eval.on=test",
        "eval.on=['tset']",
        "model.hidden=[1.5]",
        "model.norm=batch",
        "fedftg=5",
        "fedftg.mode=[1]",
        "scaffold.mode=['code']",
        "data=digits",
        "local.clip_norm=null",
        "schema_version=2",
    ],
)
def test_a_wrong_type_is_refused(override: str) -> None:
    assert refusal(override).startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    "override",
    [
        "data.beta=0",
        "data.beta=-0.1",
        "data.beta=nan",
        "data.clients=0",
        "data.train_samples=0",
        "data.server_validation=-1",
        "data.client_test=1.0",
        "data.sigma=-1",
        "train.rounds=0",
        "train.participation=0",
        "train.participation=1.1",
        "train.sampling=poisson",
        "local.epochs=0",
        "local.steps=0",
        "local.batch_size=0",
        "local.lr=0",
        "local.lr=-0.1",
        "local.lr_decay=1.5",
        "local.momentum=1.0",
        "local.weight_decay=-1",
        "local.clip_norm=0",
        "fedprox.mu=-1",
        "scaffold.server_lr=0",
        "fedftg.iterations=-1",
        "fedftg.batch_size=1",
        "fedftg.lambda_md=-1",
        "eval.every=0",
        "execution.workers=0",
        "execution.intra_op_threads=0",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "seed.data=-1",
    ],
)
def test_an_impossible_value_is_refused(override: str) -> None:
    assert refusal(override).startswith(override.partition("=")[0] + ": ")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("local.lr=1e300", "a number is at most 1e+30 in size, not 1e+300"),
        ("fedprox.mu=1e31", "a number is at most 1e+30 in size, not 1e+31"),
        ("fedgen.generator_lr=1e300", "a number is at most 1e+30 in size"),
        ("eval.batch_size=9999999999999999999999", "a whole number is at most 9223372036854775807 in size"),
        ("model.hidden=[99999999999999999999]", "a whole number is at most 9223372036854775807 in size"),
        ("execution.server_threads=99999999999", "input should be less than or equal to 1024"),
    ],
)
def test_a_number_that_no_tensor_can_hold_is_refused(override: str, says: str) -> None:
    assert refusal(override).startswith(f"{override.partition('=')[0]}: {says}")


def test_the_largest_learning_rates_step_without_an_overflow() -> None:
    grads = {"weight": torch.ones(2)}
    for keras in (False, True):
        params = zeros_like(grads)
        Adam(LARGEST_NUMBER, keras=keras).step(params, grads, Adam.start(params))
        assert torch.isfinite(params["weight"]).all()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fedftg.teacher=class"], "md_student = 'kl-teacher-student'"),
        (["fedftg.teacher=class", "fedftg.md_student=mse", "fedftg.lambda_md=0"], "md_student = 'kl-teacher-student'"),
        (["fedftg.teacher=class", "fedftg.md_student=kl-teacher-student"], "md_gen = 'kl-teacher-student'"),
        (["fedftg.mode=code", "fedftg.md_gen=kl-teacher-student"], "one teacher at a time"),
        (["fedftg.mode=code", "fedftg.lambda_bn=0.1"], "nor with lambda_bn"),
        (["fedftg.generator_update=per-teacher", "fedftg.md_gen=kl-teacher-student"], "one teacher at a time"),
    ],
)
def test_a_combination_that_has_no_meaning_is_refused(overrides: list[str], says: str) -> None:
    line = refusal(*overrides)
    assert line.startswith("fedftg: ")
    assert says in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["fedftg.teacher=class", "fedftg.md_student=kl-teacher-student", "fedftg.lambda_md=0"],
        ["fedftg.teacher=class", "fedftg.md_student=kl-teacher-student", "fedftg.md_gen=kl-teacher-student"],
        ["fedftg.teacher=class", "fedftg.md_student=kl-teacher-student", "fedftg.inputs=noise"],
        ["fedftg.mode=tuned", "fedftg.teacher=class"],
    ],
)
def test_a_combination_that_has_one_is_not(overrides: list[str]) -> None:
    assert load_config(None, overrides).fedftg.teacher == "class"


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(path=tmp_path / "none.toml")
    assert "cannot be read" in refusal(path=tmp_path)
    path = written(tmp_path, "method = fedavg\n")
    assert "not valid TOML" in refusal(path=path)
    assert "line 1" in refusal(path=path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in refusal(path=path)


def test_more_problems_than_one_are_counted() -> None:
    assert refusal("train.rounds=0", "data.beta=0", "local.lr=0").endswith("(and 2 more)")


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("method=scaffold+fedftg", "scaffold+fedftg"),
        ('method="fedprox"', "fedprox"),
        ("data.root=/data/with spaces", "/data/with spaces"),
        ("data.root='C:\\data'", "C:\\data"),
        ("data.root=[brackets]", "[brackets]"),
        ("train.rounds=200", 200),
        ("local.lr=1e-2", 0.01),
        ("local.lr=1", 1.0),
        ("local.clip_norm=none", None),
        ('local.clip_norm="none"', None),
        ("local.clip_norm=5", 5.0),
        ("data.replay=true", True),
        ("model.hidden=[32, 16]", (32, 16)),
        ("model.hidden=[]", ()),
        ('eval.on=["test","clients"]', ("test", "clients")),
        ("eval.on=[]", ()),
        (" data.beta = 0.5 ", 0.5),
    ],
)
def test_an_override_is_toml_or_else_a_string(override: str, value: object) -> None:
    found: Any = load_config(None, [override])
    for part in override.partition("=")[0].strip().split("."):
        found = getattr(found[0] if isinstance(found, tuple) else found, part)
    assert found == value


@pytest.mark.parametrize("override", ["rounds", "=3", " =3", ""])
def test_what_is_no_override_is_refused(override: str) -> None:
    assert "is not an override" in refusal(override)


def test_an_override_beats_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nrounds = 3\n[data]\nbeta = 0.5\n")
    config = load_config(path, ["train.rounds=7", "train.rounds=8"])
    assert (config.train.rounds, config.data.beta) == (8, 0.5)
    assert "train.rounds: " in refusal("train.rounds=0", path=path)
    assert f"{path}" not in refusal("train.rounds=0", path=path)


def test_an_override_does_not_reach_into_the_callers_table() -> None:
    base = {"train": {"rounds": 3}}
    before = deepcopy(base)
    assert load_config(None, ["train.rounds=4"], base).train.rounds == 4
    assert base == before


def test_an_override_below_a_value_is_refused() -> None:
    assert "is a value, not a table" in refusal("method.name=fedavg", "method=fedavg", "method.name=fedavg")
    assert "is a value, not a table" in refusal("method=fedavg", "method.name=x")


def test_the_nearest_key() -> None:
    assert nearest_key("local.lr_deacy") == "local.lr_decay"
    assert nearest_key("momentum") == "local.momentum"
    assert nearest_key("qqqq") is None
    assert {"method", "data.beta", "fedftg.lambda_md", "checkpoint.every"} <= set(keys())


# To TOML and back


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("name", ["", *presets.list_presets()])
def test_toml_gives_the_configuration_back(tmp_path: Path, name: str, comments: bool) -> None:
    config = load_config(base=presets.preset(name)) if name else Config()
    text = to_toml(config, comments)
    assert load_config(written(tmp_path, text)) == config
    assert config_from(tomllib.loads(text), "here") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["local.clip_norm=none"],
        ["local.steps=3", "model.hidden=[3]", 'eval.on=["validation"]', "model.norm=bn"],
        ["method=scaffold+fedftg", "fedftg.mode=code"],
        ["method=scaffold+fedftg", "fedftg.mode=code", "scaffold.mode=paper", "fedftg.labels=sampled"],
        ["fedftg.mode=tuned", "fedftg.lambda_md=0.1"],
        ["local.lr=1e-20", "data.beta=1e20"],
    ],
)
def test_toml_gives_changed_keys_back(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, overrides)
    assert load_config(written(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize("root", ['a "quoted" one', "back\\slash", "new\nline\ttab", "\x7f", "[é]# 日本"])
def test_toml_holds_any_string(tmp_path: Path, root: str) -> None:
    config = config_from({"data": {"root": root}}, "here")
    assert load_config(written(tmp_path, to_toml(config))) == config


def test_every_key_has_its_description_in_the_comments() -> None:
    text = to_toml(Config(), comments=True)
    lines = text.splitlines()
    undescribed = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if line and not line.startswith(("#", "[")) and not before.startswith("#")
    ]
    assert undescribed == []
    assert all(f"{key.rsplit('.', 1)[-1]} =" in text for key in keys())


def test_an_error_in_a_table_names_where_it_came_from() -> None:
    with pytest.raises(InputError, match=r"^runs/x/config.toml: unknown key 'data.bta', did you mean 'data.beta'"):
        config_from({"data": {"bta": 1}}, "runs/x/config.toml")


# Modes


@pytest.mark.parametrize("mode", ["paper", "code", "tuned"])
def test_fedftgs_mode_fills_the_keys_that_are_not_given(mode: str) -> None:
    filled = load_config(None, [f"fedftg.mode={mode}"]).fedftg
    expected = {**FedFTGSettings().model_dump(), **FEDFTG_MODES[mode], "mode": mode}
    assert filled.model_dump() == expected


def test_an_explicit_key_wins_over_fedftgs_mode() -> None:
    given = load_config(None, ["fedftg.labels=uniform", "fedftg.mode=code", "fedftg.share_epsilon=0"]).fedftg
    assert (given.labels, given.share_epsilon) == ("uniform", 0.0)
    assert (given.md_gen, given.generator_update, given.cls_weights) == ("l1-logits", "per-teacher", "batch-mean")


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        (["method=scaffold+fedftg"], "paper"),
        (["method=scaffold+fedftg", "fedftg.mode=code"], "code"),
        (["method=scaffold + fedftg", "fedftg.mode=code"], "code"),
        (["method=scaffold+fedftg", "fedftg.mode=tuned"], "paper"),
        (["method=scaffold", "fedftg.mode=code"], "paper"),
        (["method=fedavg+fedftg", "fedftg.mode=code"], "paper"),
        (["method=scaffold+fedftg", "fedftg.mode=code", "scaffold.mode=paper"], "paper"),
        (["method=scaffold+fedftg", "scaffold.mode=code"], "code"),
    ],
)
def test_the_released_fedftg_brings_its_control_variates(overrides: list[str], mode: str) -> None:
    scaffold = load_config(None, overrides).scaffold
    assert scaffold == ScaffoldSettings(mode=mode)
    assert (scaffold.displacement_from == "fused") == (mode == "code")


def test_one_key_of_the_released_control_variates_can_be_taken_back() -> None:
    chosen = load_config(None, ["method=scaffold+fedftg", "fedftg.mode=code", "scaffold.steps=own"]).scaffold
    assert (chosen.mode, chosen.steps, chosen.denominator_lr) == ("code", "own", "initial")


def test_settings_that_are_ready_made_count_like_tables() -> None:
    code = FedFTGSettings(mode="code")
    assert Config(method="scaffold+fedftg", fedftg=code).scaffold.mode == "code"
    ready = Config(method="scaffold+fedftg", fedftg=code, scaffold=ScaffoldSettings())
    assert ready.scaffold.mode == "paper"


@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("name", sorted(presets.list_presets()))
@pytest.mark.parametrize("mode", ["paper", "code", "tuned"])
def test_a_mode_given_on_the_command_line_counts_whatever_file_it_meets(
    name: str, mode: str, comments: bool, tmp_path: Path
) -> None:
    """What `fedstill show` prints and what a run directory keeps hold every key; a mode must set them all the same."""
    sparse = presets.preset(name)
    file = tmp_path / "whole.toml"
    file.write_text(to_toml(load_config(base=sparse), comments))
    overrides = ["method=scaffold+fedftg", f"fedftg.mode={mode}"]
    got = load_config(file, overrides)
    fresh = FedFTGSettings(mode=mode)
    for key in FedFTGSettings.set_by("paper"):
        if (
            getattr(load_config(base=sparse).fedftg, key)
            == FedFTGSettings.set_by(load_config(base=sparse).fedftg.mode)[key]
        ):
            assert getattr(got.fedftg, key) == getattr(fresh, key), key
    assert got.scaffold.mode == ("code" if mode == "code" else "paper")
    assert got.scaffold.denominator_lr == ("initial" if mode == "code" else "current")


def test_the_released_codes_preset_is_that_code_with_every_method() -> None:
    config = load_config(None, ["method=scaffold"], presets.preset("fedftg-cifar10-code"))
    modes = config.fedftg.mode, config.scaffold.mode, config.moon.mode, config.feddf.mode, config.fedprox.kind
    assert modes == ("code", "code", "code", "fedftg", "weight_decay_bug")
    assert (config.scaffold.denominator_lr, config.scaffold.steps) == ("initial", "fixed")
