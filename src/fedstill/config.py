"""The typed configuration: the schema of the TOML file, its overrides, and its errors."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedstill.errors import InputError
from fedstill.methods.acceptance import RefinementSettings
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.feddf import FedDFSettings
from fedstill.methods.feddistill import FedDistillSettings
from fedstill.methods.feddyn import FedDynSettings
from fedstill.methods.fedftg import FedFTGSettings
from fedstill.methods.fedgen import FedGenSettings
from fedstill.methods.fedmd import FedMDSettings
from fedstill.methods.fedprox import FedProxSettings
from fedstill.methods.moon import MoonSettings
from fedstill.methods.scaffold import ScaffoldSettings
from fedstill.settings import ModedSettings, Settings, none_as
from fedstill.training import LastBatch

Table = dict[str, Any]

_PART = r"""(?:[\w\-]+|"[^"]*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
"""A TOML key as it may be written: bare or quoted parts with dots between them."""


class SeedSettings(Settings):
    """``[seed]``: the two seeds. Methods of one pair of seeds share everything but the method."""

    data: int = Field(0, ge=0)
    """Splits and partition."""
    train: int = Field(0, ge=0)
    """Initial weights, cohorts, batch order, augmentation, noise."""


class DataSettings(Settings):
    """``[data]``: the data set and who holds it."""

    name: str = "digits"
    """Data set; `fedstill datasets` lists them."""
    root: str | None = None
    """Folder of the data sets; by default the environment variable FEDSTILL_DATA. Digits are embedded."""
    classes: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Only these classes, at least 2, renumbered from 0 in this order; by default all."""
    train_samples: int | None = Field(None, ge=1)
    """Training samples in all, a random subset; by default all."""
    test_samples: int | None = Field(None, ge=1)
    """Test samples, a random subset; by default all."""
    server_validation: int = Field(0, ge=0)
    """Samples cut from the training set before partitioning, for choosing hyper-parameters."""
    clients: int = Field(10, ge=1)
    """Clients in all, K."""
    partition: str = "dirichlet-per-client"
    """Who holds what: iid, dirichlet-per-client, dirichlet-per-class, shards, feddf, fedgen, multinomial, per-class,
    per-subclass."""
    beta: float = Field(0.3, gt=0)
    """Concentration of the Dirichlet partitions (not iid, shards, per-class, per-subclass); small is skewed."""
    sigma: float = Field(0.0, ge=0)
    """Log-normal spread of the clients' sizes (iid, dirichlet-per-client); 0 is balanced."""
    shards_per_client: int = Field(2, ge=1)
    """Shards of sorted data for each client (shards)."""
    min_size: int = Field(10, ge=1)
    """Fewest samples a client may get (dirichlet-per-class, fedgen)."""
    ratio: float = Field(1.0, gt=0, le=1)
    """Part of the data (fedgen): a class gives at most this part of itself and of the mean client, N/K."""
    samples_per_class: int = Field(3, ge=1)
    """Samples of each of its classes that a client gets (per-class, per-subclass); the others are not used."""
    classes_per_client: int | None = Field(None, ge=1)
    """Classes of a client (per-class), c of M: client k has (k c + j) mod M for j = 0 to c - 1; by default all."""
    replay: bool = False
    """Replay the authors' own random stream instead of the named one (the Dirichlet partitions, each its own)."""
    client_validation: float = Field(0.0, ge=0, lt=1)
    """Part of each client's share that is held out for validation."""
    client_test: float = Field(0.0, ge=0, lt=1)
    """Part of each client's share that is held out for testing."""
    pooled: bool = False
    """Every client trains on all clients' training samples together: the bound that no collaboration is expected to
    pass. Who holds what, and what a client is measured on, stays."""
    augment: str = "none"
    """Training augmentation: none, flip-crop-half (FedFTG's), flip-crop."""


class ModelSettings(Settings):
    """``[model]``: the architecture; keys that a model does not have are refused."""

    name: str = "cnn"
    """Architecture; `fedstill models` lists them; or package.module:factory."""
    norm: Literal["gn", "bn", "none"] | None = None
    """Normalisation; by default the model's own (GroupNorm, BatchNorm for resnet8 to resnet32)."""
    norm_groups: int | None = Field(None, ge=1)
    """Groups of GroupNorm."""
    stem: Literal["imagenet", "cifar"] | None = None
    """First layers of resnet18: 7x7 stride 2 and max-pool, or 3x3."""
    width: int | None = Field(None, ge=1)
    """Channels of the first layer of cnn."""
    hidden: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Hidden layers of mlp."""
    projection: int | None = Field(None, ge=1)
    """Width of MOON's projection head between body and classifier (the MOON paper has 256, for every method)."""
    head: str | None = None
    """Name of the linear layer that gives the logits, where it cannot be told."""
    clients: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """With several [[model]] tables: the clients that use this one; clients that no table names take turns."""


class PublicSettings(Settings):
    """``[public]``: the public set of FedMD, and FedDF's unlabelled set."""

    name: str | None = None
    """A data set, or the path of a folder of images (which have no labels)."""
    root: str | None = None
    """Folder of the data sets; by default that of the private data."""
    samples: int | None = Field(None, ge=1)
    """How many of its training samples, a random subset; by default all."""
    seed: int | None = Field(None, ge=0)
    """Seed of that subset; by default seed.data."""
    classes: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """Only these classes, relabelled from 0."""
    labels: Literal["same", "separate"] = "same"
    """Whether its classes are those of the private data, or come before them as outputs of their own (FedMD)."""


class TrainSettings(Settings):
    """``[train]``: the rounds."""

    rounds: int = Field(5, ge=1)
    """Rounds, T."""
    participation: float = Field(1.0, gt=0, le=1)
    """Part of the clients in each round, C."""
    sampling: Literal["fixed", "bernoulli"] = "fixed"
    """C K clients, rounded (a half goes up), or each with probability C (the FedDyn and FedFTG code)."""


class LocalSettings(Settings):
    """``[local]``: each client's SGD."""

    epochs: int = Field(5, ge=1)
    """Local epochs, E."""
    steps: int | None = Field(None, ge=1)
    """Local steps, instead of epochs."""
    batch_size: int = Field(50, ge=1)
    """Batch, B."""
    last_batch: LastBatch = "keep"
    """The last smaller batch of an epoch: keep, or drop where the client fills one (the FedGen and MOON code)."""
    lr: float = Field(0.1, gt=0)
    """Learning rate in round 0, eta_0."""
    lr_decay: float = Field(0.998, gt=0, le=1)
    """Factor per round, also on the server's learning rates."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum, within a round."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay, added after the clip."""
    clip_norm: float | None = Field(10.0, gt=0)
    """Largest norm of the gradient; "none" switches the clip off."""

    _none_switches_off = field_validator("clip_norm", mode="before")(none_as(None))


class EvalSettings(Settings):
    """``[eval]``: what is measured, and how often."""

    on: Annotated[tuple[Literal["test", "validation", "clients"], ...], Field(strict=False)] = ("test",)
    """Any of: test, validation (the server's part), clients (their own held-out parts); empty for none."""
    models: Annotated[tuple[Literal["sel", "all"], ...], Field(strict=False)] = ()
    """Models to measure beside the fused and the refined one: sel, the mean of the cohort's uploads; all, the mean of
    what every client uploaded last (simulation only; each client's last upload is kept)."""
    every: int = Field(1, ge=1)
    """Rounds between evaluations of the fused and the refined model; the first and last round always."""
    ensembles_every: int | None = Field(None, ge=1)
    """Rounds between evaluations of the ensembles; by default the first and last round only (simulation only)."""
    ensemble_samples: int = Field(2000, ge=1)
    """Fixed test samples on which the ensembles are measured."""
    batch_size: int = Field(1000, ge=1)
    """Evaluation batch; does not change results."""


class ExecutionSettings(Settings):
    """``[execution]``: how the same numbers are computed."""

    executor: Literal["auto", "serial", "threads", "processes", "vectorized"] = "auto"
    """serial; threads, processes (the same bits); vectorized: the cohort as one batched model (serial's numbers up to
    rounding); auto: on a CPU threads, or processes for long runs of small models without convolutions; vectorized on a
    GPU."""
    workers: int | None = Field(None, ge=1)
    """Clients trained at a time by `threads` and `processes`, batches of them by `vectorized` on a CPU; by default one
    per core."""
    clients_at_once: int | None = Field(None, ge=1)
    """Clients batched with each other by `vectorized`, which bounds its memory; by default the whole cohort."""
    compile: bool = False
    """Let torch.compile make `vectorized`'s step, which pays for small models: some 20 seconds at the start, and on a
    CPU a C++ compiler. Moves the last bits."""
    cuda_graphs: bool = False
    """Record FedFTG's server step as CUDA graphs in each round's first iteration and replay them in the others: for
    small models on a GPU. Moves the last bits."""
    intra_op_threads: int = Field(1, ge=1, le=1024)
    """Threads inside an operation while a client trains; bits are promised for equal values."""
    server_threads: int = Field(1, ge=1, le=1024)
    """The same while the server refines and evaluates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """How images and convolution kernels lie in memory while clients train one at a time and models are measured;
    auto: channels_last on a CPU where a model has convolutions and poolings, and no more GroupNorms, which are slow
    then, than poolings. Moves the last bits."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """What clients compute in: float32; on a GPU with products in tf32; or bf16 products with float32 weights."""
    client_states: Literal["auto", "memory", "disk"] = "auto"
    """Where the states of absent clients wait: memory, or disk (the run directory, or a temporary one); auto: disk once
    a model for every client would take more than a tenth of the device's memory. Does not change results."""


class CheckpointSettings(Settings):
    """``[checkpoint]``."""

    every: int = Field(1, ge=1)
    """Rounds between checkpoints; the last round always has one."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""


class TrackingSettings(Settings):
    """``[tracking]``: where a run is logged besides its own directory; does not change results."""

    to: Annotated[tuple[Literal["mlflow", "wandb"], ...], Field(strict=False)] = ()
    """mlflow, wandb (Weights & Biases): each an extra of its own, pip install 'fedstill[mlflow]'."""
    project: str | None = None
    """MLflow's experiment, W&B's project; by default their environment variable's, else fedstill."""


class Config(Settings):
    """One experiment."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    method: str = "fedavg+fedftg"
    """Base method and refinements, joined by +; `fedstill methods` lists them; or package.module:factory."""
    seed: SeedSettings = SeedSettings()
    data: DataSettings = DataSettings()
    public: PublicSettings = PublicSettings()
    model: Annotated[tuple[ModelSettings, ...], Field(min_length=1, strict=False)] = (ModelSettings(),)
    train: TrainSettings = TrainSettings()
    local: LocalSettings = LocalSettings()
    fusion: FusionSettings = FusionSettings()
    refinement: RefinementSettings = RefinementSettings()
    fedprox: FedProxSettings = FedProxSettings()
    scaffold: ScaffoldSettings = ScaffoldSettings()
    feddyn: FedDynSettings = FedDynSettings()
    moon: MoonSettings = MoonSettings()
    feddf: FedDFSettings = FedDFSettings()
    fedgen: FedGenSettings = FedGenSettings()
    feddistill: FedDistillSettings = FedDistillSettings()
    fedmd: FedMDSettings = FedMDSettings()
    fedftg: FedFTGSettings = FedFTGSettings()
    eval: EvalSettings = EvalSettings()
    execution: ExecutionSettings = ExecutionSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("model", mode="before")
    @classmethod
    def _one_table_is_one_model(cls, given: Any) -> Any:
        return (given,) if isinstance(given, dict | ModelSettings) else given

    @model_validator(mode="before")
    @classmethod
    def _released_code_goes_with_its_control_variates(cls, given: Any) -> Any:
        """``fedftg.mode = "code"`` covers SCAFFOLD's control variates too (FedFTG's released SCAFFOLDGAN)."""
        if not isinstance(given, dict):
            return given
        fedftg, scaffold = given.get("fedftg"), given.get("scaffold", {})
        mode = fedftg.get("mode") if isinstance(fedftg, dict) else getattr(fedftg, "mode", None)
        if scaffold_mode_under(str(given.get("method", "")), mode) == "code" and isinstance(scaffold, dict):
            return {**given, "scaffold": {"mode": "code", **scaffold}}
        return given


def scaffold_mode_under(method: str, fedftg_mode: str | None) -> str:
    """Return the ``scaffold.mode`` that goes with a method and FedFTG's mode, where it is not given."""
    base, *refinements = [part.strip() for part in method.split("+")]
    return "code" if base == "scaffold" and "fedftg" in refinements and fedftg_mode == "code" else "paper"


def load_config(path: Path | None = None, overrides: Sequence[str] = (), base: Table | None = None) -> Config:
    """Return the configuration of a TOML file with ``key=value`` overrides.

    Parameters
    ----------
    path : Path, optional
        TOML file; without one, ``base`` or the defaults.
    overrides : sequence of str
        Such as ``train.rounds=200`` or ``method=scaffold+fedftg``; a value is TOML, or else a string.

    Raises
    ------
    InputError
        For a missing or malformed file, unknown keys, wrong types, impossible values; it names the key, the
        file and line where there is one, and the nearest right name.
    """
    table, text = read_toml(path) if path is not None else (deepcopy(base or {}), "")
    _set_keys(table, [parse_override(override) for override in overrides])
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(_explain(error, path, _lines(text), overrides)) from error


def config_with(base: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """Return the configuration of a table in which dotted keys are set, such as ``{"data.beta": 0.1}``.

    Raises
    ------
    InputError
        As :func:`load_config` does.
    """
    table = deepcopy(dict(base))
    _set_keys(table, [(key, deepcopy(value)) for key, value in values.items()])
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(_explain(error, None, {}, ())) from error


def config_from(table: Mapping[str, Any], where: str) -> Config:
    """Return the configuration in a table, for example that of a run directory."""
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, None, {}, ())}") from error


def explained(error: ValidationError, path: Path, text: str, model: type[BaseModel]) -> InputError:
    """Return the error for a TOML file of another kind than a configuration; ``model`` is what it was read as."""
    return InputError(_explain(error, path, _lines(text), (), model))


def _set_keys(table: Table, values: Sequence[tuple[str, Any]]) -> None:
    _let_an_overriding_mode_speak(table, {key for key, _ in values})
    for key, value in values:
        _set(table, key, value)


def _let_an_overriding_mode_speak(table: Table, overridden: set[str]) -> None:
    """Forget what the file's own mode had set, where the file is complete and an override names another mode.

    A run's ``config.toml`` holds every key; without this a mode given on the command line would set none.
    """
    given = {name: own for name, own in table.items() if isinstance(own, dict)}
    if "fedftg.mode" in overridden and "scaffold" in given:
        complete = _forget_mode(given["scaffold"], ScaffoldSettings)
        if complete and "scaffold.mode" not in overridden:
            given["scaffold"].pop("mode", None)
    kinds = {name: field.annotation for name, field in Config.model_fields.items() if f"{name}.mode" in overridden}
    for name, kind in kinds.items():
        if name in given and isinstance(kind, type) and issubclass(kind, ModedSettings):
            _forget_mode(given[name], kind)


def _forget_mode(table: Table, settings: type[ModedSettings]) -> bool:
    set_by = settings.set_by(str(table.get("mode", "paper")))
    complete = set_by.keys() <= table.keys()
    for key, value in set_by.items() if complete else ():
        if table[key] == value:
            del table[key]
    return complete


def read_toml(path: Path) -> tuple[Table, str]:
    """Return a TOML file's table and its text.

    Raises
    ------
    InputError
        If it is missing, unreadable or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark before it
        return tomllib.loads(text), text
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


def parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of ``key=value``; what is not TOML is a string."""
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} is not an override: write key=value, for example train.rounds=200")
    try:
        return key.strip(), tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()


def _set(table: Table, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    place: Any = table
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else _entry(place, parent, key)
        if not isinstance(place, dict | list):
            raise InputError(f"{key}: {parent!r} is a value, not a table")
    if isinstance(place, list):
        place = _entry(place, leaf, key)
    place[leaf] = value


def _entry(tables: list[Any], place: str, key: str) -> Any:
    """Return one of several tables of the same name, such as ``model.0``."""
    if not place.isdigit() or int(place) >= len(tables):
        table = key.partition(".")[0]
        raise InputError(
            f"{key}: there are {len(tables)} [[{table}]] tables; say which one, {table}.0 to {table}.{len(tables) - 1}"
        )
    return tables[int(place)]


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Return every dotted key of the configuration, and the types that its value may have."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, field in model.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        tables = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        found |= keys(tables[0], f"{prefix}{name}.") if tables else {f"{prefix}{name}": parts}
    return found


def flat(config: Config) -> dict[str, Any]:
    """Return a configuration by dotted keys; several models count as ``model.0.name``."""

    def entries(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from entries(f"{prefix}.{key}" if prefix else key, part)
        else:
            yield prefix, value

    tables = config.model_dump(mode="json")
    models = tables["model"]
    tables["model"] = models[0] if len(models) == 1 else {str(place): model for place, model in enumerate(models)}
    return dict(entries("", tables))


def _explain(
    error: ValidationError,
    path: Path | None,
    lines: Mapping[str, int],
    overrides: Sequence[str],
    model: type[BaseModel] = Config,
) -> str:
    """Return one line on the first problem; where it is, what is wrong, and the nearest right name."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # it may be why another is missing
    key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    places = list(_outwards(problem["loc"]))
    given = {override.partition("=")[0].strip() for override in overrides} & set(places)
    line = next((lines[place] for place in places if place in lines), None)
    where = f"{path}:{line}: " if path and line and not given else f"{path}: " if path and not given else ""
    if problem["type"] == "extra_forbidden":
        near = nearest_key(key, model)
        return f"{where}unknown key {key!r}" + (f", did you mean {near!r}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool | list) else ""
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return f"{where}{key or 'configuration'}: {message[:1].lower()}{message[1:]}{shown}{more}"


def _outwards(loc: Sequence[str | int]) -> Iterator[str]:
    """Yield a problem's key and those of the tables around it, each with the places in lists and without them."""
    for end in range(len(loc), 0, -1):
        yield ".".join(str(part) for part in loc[:end])
        yield ".".join(part for part in loc[:end] if isinstance(part, str))


def nearest_key(key: str, model: type[BaseModel] = Config) -> str | None:
    """Return the most similar key there is; a right last part in another table counts."""
    known = list(keys(model))
    tables = [name for name in model.model_fields if name not in known]
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    near = get_close_matches(key, known + tables, n=1, cutoff=0.6)
    close = get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in known], n=1, cutoff=0.75)
    by_leaf = [name for name in known if close and name.rsplit(".", 1)[-1] == close[0]]
    return next(iter(elsewhere or near or by_leaf), None)


def _lines(text: str) -> dict[str, int]:
    """Return the line of every key and table in a TOML text, as far as lines that begin with a key tell."""
    lines: dict[str, int] = {}
    tables: Counter[str] = Counter()
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(rf"\s*(\[\[?)\s*({_KEY})\s*\]", line):
            name, dot, rest = _plain(header[2]).partition(".")
            tables[name] += header[1] == "[["
            place = f"{name}.{tables[name] - 1}{dot}{rest}" if tables[name] else f"{name}{dot}{rest}"
            lines[place] = number
            prefix = f"{place}."
        elif entry := re.match(rf"\s*({_KEY})\s*=", line):
            lines[f"{prefix}{_plain(entry[1])}"] = number
    return lines


def _plain(key: str) -> str:
    """Return a dotted key without its quotes and spaces."""
    return re.sub(r"""["'\s]""", "", key)


def to_toml(config: Config, comments: bool = False) -> str:
    """Return the whole configuration as TOML.

    With ``comments`` each key has its description above it, and a key that a mode sets stands commented out, so
    that another mode can be named in the file.
    """
    follows = config.scaffold.mode == scaffold_mode_under(config.method, config.fedftg.mode)
    by_other_keys = {"scaffold.mode": "fedftg.mode"} if follows else {}
    return "\n".join(_section(config, "", comments, by_other_keys)).strip() + "\n"


def _section(model: BaseModel, prefix: str, comments: bool, set_by: Mapping[str, str]) -> Iterator[str]:
    tables: list[tuple[str, str, BaseModel]] = []
    by_mode = model.set_by(str(getattr(model, "mode", ""))) if isinstance(model, ModedSettings) else {}
    set_by = {
        **set_by,
        **{f"{prefix}{name}": "mode" for name, value in by_mode.items() if getattr(model, name) == value},
    }
    for name, field in sorted(type(model).model_fields.items(), key=lambda item: item[0] != "mode"):
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            tables.append((name, f"[{prefix}{name}]", value))
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            header = f"[{prefix}{name}]" if len(value) == 1 else f"[[{prefix}{name}]]"
            tables += [(name, header, part) for part in value]
            continue
        if comments and field.description:
            yield from (f"# {line}" for line in field.description.split("\n"))
        if comments and f"{prefix}{name}" in set_by:
            yield f"# {name} = {_toml_value(value)}   # set by {set_by[f'{prefix}{name}']}"
        elif value is None:
            if name == "clip_norm":
                yield 'clip_norm = "none"'
            elif comments:
                yield f"# {name} ="
        else:
            yield f"{name} = {_toml_value(value)}"
    for name, header, table in tables:
        yield from ("", header)
        yield from _section(table, f"{prefix}{name}.", comments, set_by)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    # A JSON string is a TOML one, save for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
