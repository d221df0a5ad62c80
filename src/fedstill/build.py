"""From a configuration to a federation, with everything checked before round 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedstill.client import LocalTrainer
from fedstill.config import Config
from fedstill.data import Partition, Samples, Splits, client_parts, load_raw, make_partition, notes, split
from fedstill.data.augment import list_augmentations
from fedstill.data.dataset import ByteArray, IntArray, RawDataSet
from fedstill.data.fingerprint import Fingerprints
from fedstill.data.partition import class_counts
from fedstill.data.public import PublicSet, load_public
from fedstill.errors import InputError
from fedstill.evaluation import Evaluation, Parts
from fedstill.execution.choices import (
    device_of,
    executor_of,
    resolve,
    set_products_of_float32,
    with_client_states,
    with_memory_format,
    with_possible_executor,
    with_processes,
)
from fedstill.federation import Architecture, Federation
from fedstill.methods.base import FederationInfo, LocalObjective, Method
from fedstill.methods.fedftg import FedFTG
from fedstill.methods.registry import compose
from fedstill.methods.scaffold import ScaffoldObjective, fixed_steps
from fedstill.models import Stateless, batch_norms, build_model, check_width, find_head, split_state
from fedstill.names import unknown
from fedstill.rng import numpy_stream, torch_stream
from fedstill.training import used_in_epoch
from fedstill.weights import Weights


def build(config: Config) -> tuple[Federation, list[str]]:
    """Return the federation that a configuration describes, and notes worth showing.

    Raises
    ------
    InputError
        For anything that cannot work; nothing has been written.
    """
    left_to_us = config.execution.executor == "auto"
    config = resolve(config)
    method = compose(config)
    data = data_of(config)
    shares = [torch.from_numpy(train) for train, _, _ in data.parts]
    info, architectures = fitted(config, method, data)
    config = with_fixed_steps(config, method, info)
    labels = data.splits.train.y.numpy()
    trained_on = class_counts(labels, data.num_classes, [train for train, _, _ in data.parts])
    first = data.num_classes - len(data.private_classes)  # the public outputs, which nobody's own data have
    shown = replace(data.partition, counts=trained_on[:, first:])
    said = notes(shown, data.private_classes, config.local.batch_size if trains_by_sgd(method.objective) else None)
    models = [architecture.model for architecture in architectures]
    device = device_of(config)
    for model in models:
        model.module.to(device)
    config, doubt = with_possible_executor(config, method.objective, models, data.shape)
    said += doubt + doubts_of_measuring(config, data) + doubts_of_graphs(config, method)
    architectures = tuple(replace(one, initial=one.initial.to(device)) for one in architectures)
    config = with_memory_format(with_client_states(config, architectures, device), models)
    set_products_of_float32(config)
    train = data.splits.train.to(device)
    public = data.public.samples.to(device) if data.public else None
    trainer = LocalTrainer(
        method.objective, train, shares, config.local, data.num_classes, config.seed.train,
        [one.initial for one in architectures], config.data.augment, public,
        config.execution.memory_format == "channels_last",
    )  # fmt: skip
    config, doubt = with_processes(config, left_to_us, trainer, models)
    said += doubt
    validation = data.splits.server_validation.to(device)
    federation = Federation(
        config,
        method,
        architectures[0].info if len(architectures) == 1 else replace(info, architectures=len(architectures)),
        data.partition,
        architectures,
        trainer,
        executor_of(config, models, len(shares)),
        evaluation_of(config, data, Parts(train, measured_on(data)), device),
        device,
        public,
        validation if len(validation) else None,
        Parts(train, [held for _, held, _ in data.parts]),
        data.fingerprints,
    )
    return federation, said


def fitted(config: Config, method: Method, data: Data) -> tuple[FederationInfo, tuple[Architecture, ...]]:
    """Return the federation's sizes and its architectures, after checking that method, models and data go together."""
    if config.data.augment not in dict(list_augmentations()):
        raise unknown("augmentation (data.augment)", config.data.augment, dict(list_augmentations()))
    known = len(data.public.samples) if data.public else 0
    samples = tuple(len(train) for train, _, _ in data.parts)
    info = FederationInfo(samples, data.num_classes, data.shape, public=known)
    architectures = architectures_of(config, info)
    check_parts(config, method, architectures, data)
    return info, architectures


@dataclass(frozen=True)
class Data:
    """An experiment's data: splits, who holds what, the public set; labels as the models' outputs count them."""

    splits: Splits
    partition: Partition
    parts: list[tuple[IntArray, IntArray, IntArray]]
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    private_classes: tuple[str, ...]
    public: PublicSet | None

    @property
    def fingerprints(self) -> Fingerprints:
        """Digest of every part that has samples, the public set among them."""
        return {**self.splits.fingerprints, **({"public": self.public.fingerprint} if self.public else {})}

    @property
    def num_classes(self) -> int:
        """Number of outputs: the private classes, and the public ones where they are outputs of their own."""
        return len(self.class_names)


def data_of(config: Config) -> Data:
    """Read, split and partition the data."""
    keys, seed = config.data, config.seed.data
    root = Path(keys.root) if keys.root else None
    raw = load_raw(keys.name, root, keys.classes)
    splits = split(
        raw,
        train_samples=keys.train_samples,
        test_samples=keys.test_samples,
        server_validation=keys.server_validation,
        seed=seed,
    )
    partition = partition_of(config, splits, raw.num_classes)
    parts = client_parts(partition, keys.client_validation, keys.client_test, seed)
    if keys.pooled:
        everyone = np.sort(np.concatenate([train for train, _, _ in parts]))
        parts = [(everyone, held, tested) for _, held, tested in parts]
    public = None
    if (wanted := config.public).name is not None:
        folder, drawn = Path(wanted.root) if wanted.root else root, seed if wanted.seed is None else wanted.seed
        public = load_public(
            wanted.name, folder, shape=raw.shape, classes=wanted.classes, samples=wanted.samples, seed=drawn,
            judging=judging_images(raw, splits, parts),
        )  # fmt: skip
    data = Data(splits, partition, parts, raw.shape, raw.class_names, raw.class_names, public)
    return with_public_outputs(data) if wanted.labels == "separate" else data


def judging_images(raw: RawDataSet, splits: Splits, parts: Sequence[tuple[IntArray, IntArray, IntArray]]) -> ByteArray:
    """Return the images, as stored, by which models are chosen or judged: the server's and the clients' own."""
    at = splits.positions
    held = np.concatenate([np.concatenate(own) for _, *own in parts])
    of_train = [at["validation"], at["train"][held], *([at["test"]] if raw.held_out else [])]
    images = raw.x_train[np.concatenate(of_train)]
    return images if raw.held_out else np.concatenate([images, raw.x_test[at["test"]]])


def with_public_outputs(data: Data) -> Data:
    """Give the public classes outputs of their own, before those of the private classes."""
    if data.public is None or data.public.class_names is None:
        raise InputError("public.labels = 'separate' needs a public set with labels: name a data set in public.name")
    first = len(data.public.class_names)

    def shifted(samples: Samples) -> Samples:
        return Samples(samples.x, samples.y + first)

    own = data.splits
    splits = replace(
        own, train=shifted(own.train), server_validation=shifted(own.server_validation), test=shifted(own.test)
    )
    counts = np.pad(data.partition.counts, ((0, 0), (first, 0)))
    names = (*data.public.class_names, *data.class_names)
    return replace(data, splits=splits, partition=replace(data.partition, counts=counts), class_names=names)


def partition_of(config: Config, splits: Splits, num_classes: int) -> Partition:
    """Return who holds which training samples."""
    data = config.data
    return make_partition(
        splits.train.y.numpy(),
        num_classes,
        protocol=data.partition,
        clients=data.clients,
        beta=data.beta,
        sigma=data.sigma,
        shards_per_client=data.shards_per_client,
        min_size=data.min_size,
        ratio=data.ratio,
        samples_per_class=data.samples_per_class,
        classes_per_client=data.classes_per_client,
        subclasses=splits.subclasses,
        replay=data.replay,
        seed=config.seed.data,
    )


def architectures_of(config: Config, info: FederationInfo) -> tuple[Architecture, ...]:
    """Return the federation's architectures, each with its initial weights and its clients."""
    clients = clients_by_model(config, len(info.samples))
    names = [model.name for model in config.model]
    made = []
    for place, (model, members) in enumerate(zip(config.model, clients, strict=True)):
        stream = torch_stream(config.seed.train, "initial-weights", *([place] if place else []))
        module = build_model(
            model.name,
            input_shape=info.input_shape,
            num_classes=info.num_classes,
            norm=model.norm,
            norm_groups=model.norm_groups,
            stem=model.stem,
            width=model.width,
            hidden=model.hidden,
            projection=model.projection,
            generator=stream,
        )
        check_width(module, info.input_shape, info.num_classes)
        head = head_of(module, info.num_classes, model.head)
        own = replace(info, head=head, architectures=len(config.model))
        if len(config.model) > 1:
            own = replace(own, clients=tuple(members))
        name = model.name if names.count(model.name) == 1 else f"{place}-{model.name}"
        made.append(Architecture(name, Stateless(module, head), Weights(*split_state(module)), own))
    return tuple(made)


def clients_by_model(config: Config, total: int) -> list[list[int]]:
    """Return which clients use which ``[[model]]``: those it names; clients that nobody names take turns."""
    named = [list(model.clients or ()) for model in config.model]
    everyone = [client for members in named for client in members]
    taken = Counter(everyone)
    if twice := [client for client in everyone if taken[client] > 1]:
        raise InputError(f"model.clients: client {twice[0]} stands in more than one place; a client has one model")
    if wrong := [client for client in everyone if not 0 <= client < total]:
        raise InputError(f"model.clients: there is no client {wrong[0]}, they are 0 to {total - 1}")
    open_tables = [place for place, model in enumerate(config.model) if model.clients is None]
    left = [client for client in range(total) if client not in taken]
    if left and not open_tables:
        raise InputError(f"model.clients: client {left[0]} has no model; name it, or leave one table without clients")
    for turn, client in enumerate(left):
        named[open_tables[turn % len(open_tables)]].append(client)
    if empty := [place for place, members in enumerate(named) if not members]:
        raise InputError(f"model.{empty[0]}: no client is left for this model; there are {total} clients")
    return [sorted(members) for members in named]


def head_of(module: nn.Module, num_classes: int, name: str | None) -> str | None:
    """Return the name of a model's head; None where it has none that can be told, and none was named."""
    try:
        return find_head(module, num_classes, name)
    except InputError:
        if name is not None:
            raise
        return None


def check_parts(config: Config, method: Method, architectures: Sequence[Architecture], data: Data) -> None:
    """Refuse parts that do not go together, before round 0."""
    personal = method.objective.personal
    if personal and method.refinements:
        raise InputError(
            f"method = {config.method!r}: there is no global model for {method.refinements[0].name!r} to refine: "
            f"every client has a model of its own"
        )
    if personal and config.eval.models:
        raise InputError(f"eval.models: with {config.method!r} every client has a model of its own, none is averaged")
    check_public(config, method, data)
    check_held_out(config, method, data)
    for architecture in architectures:
        info, model = architecture.info, architecture.model
        if config.fusion.head == "class-weighted" and info.head is None:
            raise InputError("fusion.head = 'class-weighted' needs a linear head: name it with model.head")
        if method.objective.needs_head and info.head is None:
            raise InputError(
                f"method = {config.method!r} needs to know the linear layer of {architecture.name!r} that gives the "
                f"logits: name it with model.head"
            )
        if trains_by_sgd(method.objective):
            check_batches(config, model, info)
        for refinement in method.refinements:
            refinement.check(model, info)


def check_public(config: Config, method: Method, data: Data) -> None:
    """Refuse a method that needs a public set where there is none, or one whose labels clash."""
    if method.needs_public and data.public is None:
        raise InputError(
            f"method = {config.method!r} needs a public set: name a data set or a folder, such as public.name=mnist"
        )
    if not method.objective.needs_public or data.public is None:
        return
    if data.public.class_names is None:
        raise InputError(f"method = {config.method!r} learns the public set's labels, and a folder has none")
    if config.public.labels == "same" and data.public.class_names != data.class_names:
        raise InputError(
            f"public.labels = 'same': the classes of {config.public.name} ({len(data.public.class_names)}) are not "
            f"those of {config.data.name} ({len(data.class_names)}); with public.labels = 'separate' both get outputs"
        )


def measured_on(data: Data) -> list[IntArray]:
    """Return the samples on which each client is measured: its test part, or where it has none what it validates on."""
    return [tested if len(tested) else held for _, held, tested in data.parts]


def doubts_of_measuring(config: Config, data: Data) -> list[str]:
    """Return a note where clients are measured on what refinements are accepted by."""
    chosen_by_it = config.refinement.accept == "clients" and "clients" in config.eval.on
    if not (chosen_by_it and any(len(held) and not len(tested) for _, held, tested in data.parts)):
        return []
    return [
        "clients are measured on the samples by which refinements are accepted, which flatters the refined model: "
        "set data.client_test"
    ]


def doubts_of_graphs(config: Config, method: Method) -> list[str]:
    """Return a note where graphs are asked for and nothing would be recorded."""
    if not config.execution.cuda_graphs or any(isinstance(part, FedFTG) for part in method.refinements):
        return []
    return [f"execution.cuda_graphs: {config.method} has no server step that is recorded, only FedFTG has"]


def check_held_out(config: Config, method: Method, data: Data) -> None:
    """Refuse what is measured or decided on held-out samples where nothing is held out."""
    if "validation" in config.eval.on and not len(data.splits.server_validation):
        raise InputError("eval.on has 'validation', but data.server_validation is 0")
    if "clients" in config.eval.on and not any(len(held) + len(test) for _, held, test in data.parts):
        raise InputError(
            f"eval.on has 'clients', but no client holds out a sample: data.client_test is {config.data.client_test:g} "
            f"and data.client_validation {config.data.client_validation:g} of its share; raise one of them"
        )
    if config.refinement.accept == "clients" and not any(len(held) for _, held, _ in data.parts):
        raise InputError(
            f"refinement.accept = 'clients' asks the clients' held-out samples, and none holds out one: "
            f"data.client_validation is {config.data.client_validation:g}; raise it"
        )
    needs = [part.name for part in method.refinements if part.needs_validation]
    if config.refinement.accept == "server":
        needs.append("refinement.accept = 'server'")
    if needs and not len(data.splits.server_validation):
        without = ", or feddf.patience = 0 and feddf.drop_below = 0" if needs[0] == "feddf" else ""
        raise InputError(f"{needs[0]} needs samples that the server holds out: set data.server_validation{without}")


def with_fixed_steps(config: Config, method: Method, info: FederationInfo) -> Config:
    """Return the configuration with the same number of local steps for all, where SCAFFOLD's code form asks for it."""
    objective = method.objective
    fixed = isinstance(objective, ScaffoldObjective) and objective.settings.steps == "fixed"
    if not fixed or config.local.steps is not None:
        return config
    steps = fixed_steps(info, config.local.batch_size, config.local.epochs)
    return config.model_copy(update={"local": config.local.model_copy(update={"steps": steps})})


def trains_by_sgd(objective: LocalObjective) -> bool:
    """Say whether an objective's clients run the common SGD loop, whose settings are ``[local]``."""
    return type(objective).run is LocalObjective.run


def check_batches(config: Config, model: Stateless, info: FederationInfo) -> None:
    """Refuse a BatchNorm model where a batch would hold one sample."""
    if not batch_norms(model.module):
        return
    size = config.local.batch_size

    def last(samples: int) -> int:
        return (used_in_epoch(samples, size, config.local.last_batch) - 1) % size + 1

    alone = [client for client in info.members if last(info.samples[client]) == 1]
    if alone:
        raise InputError(
            f"client {alone[0]} holds {info.samples[alone[0]]} samples, so that with local.batch_size = {size} "
            f"BatchNorm would see a batch of one; choose another batch size, local.last_batch = 'drop', or "
            f"model.norm = 'gn'"
        )


def evaluation_of(config: Config, data: Data, own: Parts, device: torch.device) -> Evaluation:
    """Return what models are measured on."""
    wanted = config.eval.on
    sets: dict[str, Samples] = {}
    if "test" in wanted:
        sets["test"] = data.splits.test.to(device)
    if "validation" in wanted:
        sets["validation"] = data.splits.server_validation.to(device)
    measured = sets.get("test", sets.get("validation"))
    if measured is not None and len(measured) > config.eval.ensemble_samples:
        stream = numpy_stream(config.seed.data, "ensemble-samples")
        chosen = stream.choice(len(measured), config.eval.ensemble_samples, replace=False)
        measured = measured.take(torch.from_numpy(chosen).to(device))
    counts = torch.from_numpy(data.partition.counts)
    held = own if "clients" in wanted else None
    channels_last = config.execution.memory_format == "channels_last"
    return Evaluation(sets, held, measured, data.num_classes, config.eval.batch_size, counts, channels_last)
