"""The schema of the configuration: its tables and keys, their types, defaults and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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
from fedstill.settings import Settings, none_as
from fedstill.training import LastBatch


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
    """Record FedFTG's server step as CUDA graphs in each round's first two iterations and replay them in the others:
    for small models on a GPU. Moves the last bits."""
    intra_op_threads: int = Field(1, ge=1, le=1024)
    """Threads inside an operation while a client trains; bits are promised for equal values."""
    server_threads: int = Field(1, ge=1, le=1024)
    """The same while the server refines and evaluates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """How images and convolution kernels lie in memory while clients train one at a time, the server refines and
    models are measured; auto: channels_last on a CPU where a model has convolutions and poolings, and no more
    GroupNorms, which are slow then, than poolings. Moves the last bits."""
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
