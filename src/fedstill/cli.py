"""The command ``fedstill``."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from fedstill import presets
from fedstill.config import Config, load_config, to_toml
from fedstill.errors import FedstillError, InputError

if TYPE_CHECKING:
    from fedstill.callbacks import Callback


class Interruptible(TyperGroup):
    """Commands of which each, when it is stopped, says so in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("stopped")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="fedstill",
    cls=Interruptible,
    help="Federated learning by distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

INTERRUPTED = 130
NOTHING = "nothing had been written"

Arguments = Annotated[
    list[str] | None, typer.Argument(help="A TOML file, then key=value overrides such as train.rounds=200.")
]
Preset = Annotated[
    str | None, typer.Option(help="Start from a preset instead of a file; 'fedstill presets' lists them.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs at a time; by default one per core.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")]
On = Annotated[str, typer.Option(help="test or validation.")]
Baseline = Annotated[str | None, typer.Option(help="The variant that differences are taken from.")]


@app.command()
def run(
    arguments: Arguments = None,
    preset: Preset = None,
    directory: Annotated[Path | None, typer.Option("--out", help="Directory of the run; it must not exist.")] = None,
    quiet: Annotated[bool, typer.Option(help="Print the result only.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say where a round's time goes, and trace the second round.")
    ] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also log to mlflow or wandb; once for each.")
    ] = None,
) -> None:
    """Run an experiment; without any argument the embedded default."""
    from fedstill.experiment import run as run_experiment
    from fedstill.profiling import Profiler

    tracked = [f"tracking.to={json.dumps(track)}"] if track else []
    config = configuration([*(arguments or []), *tracked], preset)
    path = directory or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}-{config.data.name}"
    profiler = Profiler(path) if profile else None
    with resumable(path):
        callbacks = [*([profiler] if profiler else []), *display(quiet)]
        result = run_experiment(config, directory=path, callbacks=callbacks)
    summary(result.records, path)
    if profiler:
        out.print(escape("\n".join(profiler.table())))
    if not preset and all("=" in argument for argument in arguments or []):
        out.print(f"keys that were not given are those of the preset {presets.DEFAULT!r}: 'fedstill show' prints them")


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of the run.")],
    quiet: Annotated[bool, typer.Option(help="Print the result only.")] = False,
) -> None:
    """Go on with a run that was stopped, to the same bits."""
    from fedstill.experiment import resume as resume_experiment

    with resumable(directory):
        result = resume_experiment(directory, callbacks=display(quiet))
    summary(result.records, directory)


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(help="A study file; docs/studies.md says what stands in it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value for every run.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--out", help="Results folder; by default runs/ and the file's name.")
    ] = None,
    workers: Workers = None,
    retry_failed: RetryFailed = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="WORD...", help="Only runs with these words in label or directory.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the study and say what would be run.")] = False,
) -> None:
    """Run the runs of a study that are not there yet, or its search; exit code 1 where one failed."""
    from fedstill.studies import Study
    from fedstill.studies.command import by_command

    with interruptible(lambda: f"go on with: {shlex.join(['fedstill', *sys.argv[1:]])}"):
        words = [*only, *(one for one in overrides or [] if "=" not in one)] if only else []
        planned = Study.load(study, *(one for one in overrides or [] if one not in words))
        failed = by_command(planned, directory, workers, retry_failed, words, dry_run, out, err)
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    directory: Annotated[Path | None, typer.Option("--out", help="Directory; it must not exist.")] = None,
    short: Annotated[bool, typer.Option(help="Two rounds of two epochs, to see that everything works.")] = False,
) -> None:
    """Compare seven methods on handwritten digits: a table, a picture, a run directory for each."""
    from fedstill.demo import demo as run_demo
    from fedstill.demo import show as show_demo

    path = directory or Path("demo-runs") / time.strftime("%Y%m%d-%H%M%S")
    with interruptible(lambda: f"the runs so far are in {path}" if path.exists() else NOTHING):
        comparison = run_demo(path, short, err)
    show_demo(comparison, out)
    out.print(escape(f"the curves are in {path / 'curves.png'}, the table in table.md, the runs beside them"))


@app.command()
def partition(
    arguments: Arguments = None,
    preset: Preset = None,
    picture: Annotated[Path, typer.Option("--out", help="The picture, .png or .svg.")] = Path("partition.png"),
) -> None:
    """Draw who holds how many samples of which class."""
    from fedstill.build import partition_of
    from fedstill.data import draw_partition, load_raw, notes, split

    config = configuration(arguments or [], preset)
    data = config.data
    raw = load_raw(data.name, Path(data.root) if data.root else None, data.classes)
    splits = split(
        raw,
        train_samples=data.train_samples,
        test_samples=data.test_samples,
        server_validation=data.server_validation,
        seed=config.seed.data,
    )
    shares = partition_of(config, splits, raw.num_classes)
    title = f"{data.name}, {data.partition}, beta {data.beta}, seed {config.seed.data}"
    try:
        draw_partition(shares.counts, raw.class_names, picture, title)
    except OSError as error:
        raise InputError(f"{picture}: cannot be written ({error.strerror or error})") from error
    for line in notes(shares, raw.class_names, config.local.batch_size):
        out.print(f"[yellow]note[/] {escape(line)}")
    out.print(f"{escape(str(picture))}  (fingerprint {shares.fingerprint[:16]})")


@app.command()
def methods() -> None:
    """List the methods; a refinement is added to a base with +."""
    from fedstill.methods.registry import list_methods

    listing(list_methods())


@app.command()
def datasets() -> None:
    """List the data sets."""
    from fedstill.data import list_datasets

    listing(dict(list_datasets()))


@app.command()
def models() -> None:
    """List the models."""
    from fedstill.models import list_models

    listing(list_models())


@app.command(name="presets")
def list_presets() -> None:
    """List the presets."""
    listing(presets.list_presets())


@app.command()
def conformance(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Methods, such as scaffold or +fedftg, and key=value to be held fixed.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method of your own, package.module:factory.")] = None,
    like: Annotated[str | None, typer.Option(help="The built-in method that it claims to be.")] = None,
    references: Annotated[Path | None, typer.Option(help="Other reference cases than fedstill's own.")] = None,
    checks: Annotated[bool, typer.Option("--list", help="List the checks.")] = False,
) -> None:
    """Check that methods do what their papers say; exit code 1 where one does not."""
    from fedstill.conformance.report import by_command, print_checks

    if checks:
        print_checks(out)
    elif by_command(arguments or [], method, like, references, out):
        raise typer.Exit(1)


@app.command()
def compare(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN... | STUDY", help="Run directories, or a study's file or results.")
    ],
    form: Annotated[
        str | None, typer.Option("--format", help="terminal, csv, markdown or latex; by default as --out ends.")
    ] = None,
    last: Annotated[int, typer.Option(help="Evaluated rounds in the mean of the last ones.")] = 5,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", metavar="0.7 0.8...", help="Accuracies to be reached.")
    ] = None,
    on: On = "test",
    baseline: Baseline = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare runs whose data differ, too.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All tables, not the first alone.")] = False,
    file: Annotated[Path | None, typer.Option("--out", help="Write to this file.")] = None,
) -> None:
    """Compare runs, or the variants of a study: means over seeds, paired differences, costs."""
    from fedstill.studies.compare import compare as compare_runs
    from fedstill.studies.tables import as_text, form_of, print_tables, write

    chosen = form_of(form, file)
    goals, paths = accuracies_and_paths(arguments, targets)
    found = compare_runs(paths, last=last, targets=goals, on=on, baseline=baseline, anyway=anyway)
    if file is not None:
        write(as_text(found, chosen, everything), file)
        out.print(escape(f"the comparison is in {file}"))
    elif chosen == "terminal":
        print_tables(found, out, everything)
    else:
        sys.stdout.write(as_text(found, chosen, everything))


@app.command()
def report(
    paths: Annotated[
        list[str], typer.Argument(metavar="RUN... | STUDY", help="Run directories, or a study's file or results.")
    ],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; by default report/ in the study, in the run, or beside runs.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="By default the study's.")] = None,
    on: On = "test",
    baseline: Baseline = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Report runs whose data differ, too.")] = False,
) -> None:
    """Write a study, or runs, as one HTML file with figures, and the figures as SVG and PDF beside it."""
    from fedstill.report.html import write_report

    page = write_report(paths, folder, title=title, on=on, baseline=baseline, anyway=anyway)
    out.print(escape(f"the report is in {page}, its figures in {page.parent / 'figures'}"))


@app.command()
def reproduce(
    table: Annotated[str | None, typer.Argument(help="A table or figure, such as fedftg/table1.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List what there is, its cost and its data.")] = False,
    only: Annotated[str | None, typer.Option(help="Only these cells, such as cifar10,beta=0.3,fedftg.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; by default the paper's, 1 if small.")] = None,
    scale: Annotated[str, typer.Option(help="paper, or small: what a laptop finishes, no reproduction.")] = "paper",
    directory: Annotated[
        Path | None, typer.Option("--out", help="Results folder; by default runs/reproduce/PAPER.")
    ] = None,
    workers: Workers = None,
    retry_failed: RetryFailed = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    show_only: Annotated[bool, typer.Option("--show", help="Print the table so far, and run nothing.")] = False,
) -> None:
    """Run a paper's table and print it with our numbers beside the paper's; what is there already is not run again."""
    from fedstill.reproduce.command import by_command, plan_of, print_list, scale_of

    form = scale_of(scale)
    if list_all:
        print_list(form, out)
        return
    plan = plan_of(table, only, form, seeds, directory)
    with interruptible(lambda: f"go on with: {shlex.join(['fedstill', *sys.argv[1:]])}"):
        failed = by_command(plan, out, err, workers, retry_failed=retry_failed, dry_run=dry_run, show=show_only)
    if failed:
        raise typer.Exit(1)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A preset.")] = presets.DEFAULT) -> None:
    """Print a preset as a complete, commented TOML file."""
    sys.stdout.write(to_toml(load_config(base=presets.preset(name)), comments=True))


def configuration(arguments: list[str], preset: str | None) -> Config:
    """Return the configuration that a command line asks for."""
    files = [argument for argument in arguments if "=" not in argument or Path(argument).is_file()]
    overrides = [argument for argument in arguments if argument not in files]
    if len(files) > 1:
        raise InputError(f"more than one configuration file: {', '.join(files)}")
    if files and preset:
        raise InputError("a file and --preset do not go together; 'fedstill show PRESET > my.toml' starts a file")
    if files:
        return load_config(Path(files[0]), overrides)
    base = presets.preset(preset or presets.DEFAULT)
    if any(override.partition("=")[0].strip() == "model.name" for override in overrides):
        base.pop("model", None)  # a preset's width says nothing about another architecture
    return load_config(None, overrides, base)


def display(quiet: bool) -> list[Callback]:
    """Return what shows progress on standard error, unless it should be quiet."""
    from fedstill.progress import ProgressDisplay

    return [] if quiet else [ProgressDisplay(err)]


def accuracies_and_paths(arguments: list[str], targets: list[str] | None) -> tuple[list[float], list[str]]:
    """Return the numbers of ``--targets 0.7 0.8``, of which all but the first come as arguments, and the paths."""
    goals, paths = list(targets or []), list[str]()
    for argument in arguments:
        is_goal = bool(targets) and argument.replace(".", "", 1).isdigit() and not Path(argument).exists()
        (goals if is_goal else paths).append(argument)
    try:
        return [float(goal) for text in goals for goal in text.replace(",", " ").split()], paths
    except ValueError as error:
        raise InputError(f"--targets: {error}; name accuracies such as 0.7") from error


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say how to go on when a run is stopped by Ctrl-C or by SIGTERM."""
    from fedstill.runs.directory import began

    hint = f"go on with: fedstill resume {shlex.quote(str(path))}"
    with interruptible(lambda: hint if began(path) else NOTHING):
        yield


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """Say what is left when the block is stopped by Ctrl-C or by SIGTERM."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(escape(f"stopped; {left()}"))
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def signals_heard() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM, where they are not ignored, raise KeyboardInterrupt in the block."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    heard = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(records: list[dict[str, object]], path: Path) -> None:
    """Print a run's result in a few lines."""
    from fedstill.experiment import accuracies
    from fedstill.progress import megabytes

    for on in ("test", "validation", "clients"):
        found = accuracies(records, on)
        if found:
            rounds = sorted(found)
            mean = sum(found.values()) / len(found)
            out.print(
                f"accuracy on {on}: {found[rounds[-1]]:.4f} after round {rounds[-1]}, "
                f"{found[rounds[0]]:.4f} after round {rounds[0]}, mean over evaluated rounds {mean:.4f}"
            )
    out.print(f"{megabytes(records):.1f} MB sent; everything is in {escape(str(path))}")


def listing(entries: dict[str, str]) -> None:
    """Print names with their summaries, one entry a line where nobody's terminal is to be fitted."""
    if not out.is_terminal:
        widest = max(map(len, entries))
        for name, text in entries.items():
            out.print(escape(f"{name:<{widest}}  {text}"))
        return
    table = Table.grid(padding=(0, 2))
    for name, text in entries.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(text))
    out.print(table)


def main() -> None:
    """Run the command line; errors are one line, exit code 2 for bad input and 1 for a run that cannot go on."""
    try:
        with signals_heard():
            app(standalone_mode=True)
    except FedstillError as error:
        err.print(f"[red]error[/] {escape(' '.join(str(error).split()))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # before a command has begun, or after its end
        err.print("stopped")
        sys.exit(INTERRUPTED)
