"""The command ``fedstill``: what it lists, what it refuses and how, what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedstill import cli, presets
from fedstill.config import config_from, load_config, to_toml
from fedstill.data import list_datasets
from fedstill.methods.registry import list_methods
from fedstill.models import list_models
from small import small

QUICK = ["data.train_samples=200", "data.test_samples=100", "data.server_validation=0", "data.clients=4"]
QUICK += ["train.rounds=1", "local.epochs=1", "model.width=4", "fedftg.iterations=1", "fedftg.generator_width=4"]

MODELS = """
from torch import nn

class Wide(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.fc = nn.Linear(64, num_classes + 1)

    def forward(self, x):
        return self.fc(x.flatten(1))

def strange(input_shape, num_classes):
    return [input_shape]

def greedy(input_shape):
    return nn.Linear(1, 1)

class Rejecting(Wide):
    def forward(self, x):
        raise ValueError("two lines:\\nnot [bold]these[/] samples")

value = 3
"""


class Told:
    """Exit code and what was printed."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Command:
    """The command line, in this process, in an empty folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *arguments: str) -> Told:
        self.monkeypatch.setattr(sys, "argv", ["fedstill", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = self.capsys.readouterr()
        return Told(caught.value.code, shown.out, shown.err)

    def refuses(self, *arguments: str) -> str:
        """Return the one line with which the command refuses; nothing is written."""
        before = sorted(self.folder.rglob("*"))
        told = self(*arguments)
        assert told.code == 2
        assert told.out == ""
        assert told.err.startswith("error ")
        assert told.err.endswith("\n")
        assert told.err.count("\n") == 1
        assert sorted(self.folder.rglob("*")) == before
        return told.err.removeprefix("error ").rstrip("\n")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    return Command(tmp_path, monkeypatch, capsys)


# Lists


def test_lists_have_one_line_an_entry(command: Command) -> None:
    for name, entries in {
        "methods": list_methods(),
        "datasets": dict(list_datasets()),
        "models": list_models(),
        "presets": presets.list_presets(),
    }.items():
        told = command(name)
        assert (told.code, told.err) == (0, "")
        shown = told.out.splitlines()
        assert len(shown) == len(entries)
        for line, (entry, summary) in zip(shown, entries.items(), strict=True):
            assert line.split(maxsplit=1) == [entry, summary]
    assert {"fedavg", "fedprox", "scaffold", "+fedftg"} <= set(list_methods())
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100"} <= set(dict(list_datasets()))
    assert {"cnn", "resnet18", "mlp", "feddyn-cnn"} <= set(list_models())
    assert {"digits", "fedftg-cifar10-paper", "fedftg-cifar10-code"} <= set(presets.list_presets())


def test_a_name_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    cli.listing({"[bold]x[/]": "needs [webp]", "y": "[/]"})
    assert capsys.readouterr().out == "[bold]x[/]  needs [webp]\ny           [/]\n"


@pytest.mark.parametrize("name", presets.list_presets())
def test_show_prints_a_preset_that_can_be_run(command: Command, name: str) -> None:
    told = command("show", name)
    assert (told.code, told.err) == (0, "")
    assert config_from(tomllib.loads(told.out), name) == load_config(base=presets.preset(name))
    assert "# Learning rate in round 0, eta_0." in told.out


def test_show_and_help(command: Command) -> None:
    assert command("show").out == command("show", "digits").out
    assert "did you mean 'digits'?" in command.refuses("show", "digit")
    told = command("--help")
    assert told.code == 0
    assert all(name in told.out for name in ("run", "resume", "methods", "datasets", "models", "presets", "show"))
    assert command("run", "--nonsense").code == 2


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["method=fedagv"], "unknown method 'fedagv', did you mean 'fedavg'?"),
        (["method=fedavg+fedtfg"], "unknown refinement 'fedtfg', did you mean 'fedftg'?"),
        (["method=fedftg"], "needs a base method before it"),
        (["method=fedavg+scaffold"], "'scaffold' is a base method and can only come first"),
        (["method=nowhere_at_all:Mine"], "cannot be imported"),
        (["method=a:b:c"], "'a:b:c' cannot be imported"),
        (["method=[red]x[/red]"], "unknown method '[red]x[/red]'"),
        (["model.name=ccn"], "no model 'ccn'; did you mean 'cnn'?"),
        (["model.name=nowhere_at_all:Mine"], "cannot import 'nowhere_at_all:Mine'"),
        (["model.stem=cifar"], "model.stem: model 'cnn' has no such option"),
        (["data.name=digitts"], "did you mean 'digits'?"),
        (["data.name=cifar10"], "set data.root or the environment variable FEDSTILL_DATA"),
        (["data.name=cifar10", "data.root=no[/]where"], "no[/]where"),
        (["data.partition=dirichlet-per-clinet"], "did you mean 'dirichlet-per-client'?"),
        (["data.augment=flip"], "unknown augmentation (data.augment) 'flip'"),
        (["data.clients=1201"], "1201 clients cannot share 1200 training samples"),
        (["data.train_samples=5000"], "data.train_samples: 5000 samples asked for"),
        (["data.server_validation=5000"], "data.server_validation: 5000 samples asked for"),
        (["data.beta=0"], "data.beta: input should be greater than 0, not 0"),
        (["train.participation=0"], "train.participation: "),
        (["data.clinets=3"], "unknown key 'data.clinets', did you mean 'data.clients'?"),
        (["data.name='[bold]'"], "'[bold]'"),
        (["fedftg.teacher=class"], "goes with md_student = 'kl-teacher-student' only"),
        (["fedftg.lambda_bn=1"], "fedftg.lambda_bn needs a model with BatchNorm"),
        (["model.norm=bn", "local.batch_size=1"], "BatchNorm would see a batch of one"),
        (["data.client_test=0.6", "data.client_validation=0.6"], "less than 1 together"),
        (["eval.on=['clients']"], "eval.on has 'clients'"),
        (["one.toml", "two.toml"], "more than one configuration file: one.toml, two.toml"),
        (["one.toml"], "one.toml: there is no such file"),
        (["one.toml", "--preset", "digits"], "a file and --preset do not go together"),
        (["--preset", "digit"], "unknown preset 'digit', did you mean 'digits'?"),
        (["=3"], "'=3' is not an override"),
    ],
)
def test_bad_input_is_refused_in_one_line(command: Command, arguments: list[str], says: str) -> None:
    assert says in command.refuses("run", *arguments, "--out", "run")
    assert says in command.refuses("run", *arguments)


def test_a_bad_file_is_refused_with_its_line(command: Command) -> None:
    file = command.folder / "mine[1].toml"
    file.write_text('method = "fedavg"\n[data]\nbta = 0.1\n')
    assert command.refuses("run", str(file)) == f"{file}:3: unknown key 'data.bta', did you mean 'data.beta'?"
    file.write_text("method = \n")
    assert f"{file}: not valid TOML" in command.refuses("run", str(file))


def test_a_file_may_have_an_equals_sign_in_its_name(command: Command) -> None:
    file = command.folder / "lr=0.1" / "mine.toml"
    file.parent.mkdir()
    file.write_text('method = "fedagv"\n')
    assert "unknown method 'fedagv'" in command.refuses("run", "lr=0.1/mine.toml", "local.lr=0.2")


def test_a_truncated_data_file_is_refused(command: Command) -> None:
    path = command.folder / "mnist.npz"
    x, y = np.zeros((40, 28, 28), np.uint8), (np.arange(40) % 10).astype(np.uint8)
    np.savez_compressed(path, x_train=x, y_train=y, x_test=x, y_test=y)
    arguments = ["run", "--preset", "digits", "data.name=mnist", f"data.root={command.folder}", "--out", "run"]
    assert "200 samples asked for, and mnist has 40" in command.refuses(*arguments)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}" in command.refuses(*arguments)
    path.write_text("nothing of the kind")
    assert f"{path}" in command.refuses(*arguments)
    path.unlink()
    assert f"{path} does not exist" in command.refuses(*arguments)


def test_a_model_from_outside_is_checked(command: Command, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    (folder / "models_of_mine.py").write_text(MODELS)
    (folder / "broken_models_of_mine.py").write_text("def (:\n")
    command.monkeypatch.syspath_prepend(folder)
    # The preset's own option goes first: no model from outside has it.
    file = command.folder / "mine.toml"
    file.write_text(to_toml(small()))
    for name, says in {
        "models_of_mine:Wide": "the output of Wide is 11 per sample, but the data has 10 classes",
        "models_of_mine:strange": "returned a list, not a torch.nn.Module",
        "models_of_mine:greedy": "must accept the keywords input_shape and num_classes",
        "models_of_mine:value": "is a int, not a callable",
        "models_of_mine:Absent": "cannot import",
        "broken_models_of_mine:Wide": "SyntaxError",
        "models_of_mine:Rejecting": "two lines: not [bold]these[/] samples",
    }.items():
        assert says in command.refuses("run", str(file), f"model.name={name}", "--out", "run")


def test_a_directory_that_exists_is_refused(command: Command) -> None:
    (command.folder / "run").mkdir()
    (command.folder / "run" / "mine").write_text("keep this")
    line = command.refuses("run", "--out", "run")
    assert line == "run: exists already; name another directory"
    assert (command.folder / "run" / "mine").read_text() == "keep this"
    assert "not a run directory" in command.refuses("resume", "run")
    assert "not a run directory" in command.refuses("resume", "r[u]n")


# What runs


def test_run_prints_its_progress_and_its_result(command: Command) -> None:
    told = command("run", *QUICK, "--out", "a [run]")
    assert told.code == 0
    assert "accuracy on test: " in told.out
    assert "MB sent; everything is in a [run]\n" in told.out
    assert "those of the preset 'digits'" in told.out
    assert "fedavg+fedftg on digits: 4 clients" in told.err
    assert "round   1 | loss" in told.err
    assert "Traceback" not in told.err
    assert (command.folder / "a [run]" / "metrics.jsonl").exists()
    told = command("resume", "a [run]", "--quiet")
    assert (told.code, told.err) == (0, "")
    assert "everything is in a [run]" in told.out


def test_run_names_its_directory_itself(command: Command) -> None:
    told = command("run", *QUICK, "method=fedavg", "--quiet")
    assert (told.code, told.err) == (0, "")
    (made,) = (command.folder / "runs").iterdir()
    assert made.name.endswith("-fedavg-digits")
    assert str(Path("runs") / made.name) in told.out


def test_a_run_that_cannot_go_on_exits_with_1(command: Command) -> None:
    told = command("run", *QUICK, "local.lr=1e30", "local.clip_norm=none", "--quiet", "--out", "run")
    assert told.code == 1
    assert told.err.startswith("error round 1, client ")
    assert "training loss" in told.err
    assert told.err.count("\n") == 1


def test_ctrl_c_before_anything_is_written_says_so(command: Command) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    command.monkeypatch.setattr("fedstill.experiment.build", interrupted)
    told = command("run", *QUICK, "--out", "run")
    assert told.code == 130
    assert told.err == "stopped; nothing had been written\n"
    assert not (command.folder / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_command_that_is_stopped_says_so(command: Command, number: signal.Signals) -> None:
    def stop(*arguments: object, **more: object) -> None:
        signal.raise_signal(number)

    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outside = signal.signal(number, usual)  # a background job ignores Ctrl-C
    command.monkeypatch.setattr("fedstill.report.html.write_report", stop)
    try:
        told = command("report", "run")
        assert (told.code, told.out, told.err) == (130, "", "stopped\n")
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, outside)


IMPORTING = """
import sys, time

class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "fedstill":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow)
from fedstill_command import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_seconds_of_the_imports_is_one_line(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTING, "methods"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        told, said = process.communicate(timeout=30)
    assert (process.returncode, told, said) == (130, "", "stopped; nothing had been written\n")


ENDING = """
import atexit, signal, sys, types

command = types.ModuleType("fedstill.cli")
command.main = lambda: sys.exit(3)
sys.modules |= {"fedstill": types.ModuleType("fedstill"), "fedstill.cli": command}
atexit.register(signal.raise_signal, signal.SIGTERM)
from fedstill_command import main
main()
"""


def test_a_signal_after_the_end_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_partition_draws_a_picture(command: Command) -> None:
    told = command("partition", "data.clients=4", "data.beta=0.1", "--out", "who [1].svg")
    assert told.code == 0
    assert told.out.splitlines()[-1].startswith("who [1].svg  (fingerprint ")
    assert (command.folder / "who [1].svg").stat().st_size > 1000
    assert "a .png or .svg file" in command.refuses("partition", "--out", "who.jpg")
    assert "cannot be written" in command.refuses("partition", "--out", "no/such/who.svg")


def test_the_installed_command_refuses_in_one_line_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from fedstill_command import main; main()", "run", "model.name=[x]"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "20", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error model.name: no model '[x]'; did you mean ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
