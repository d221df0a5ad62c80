"""From a configuration to a federation, with everything checked before round 0."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedstill.client import LocalTrainer
from fedstill.config import Config
from fedstill.data import Partition, Samples, Splits, client_parts, load_raw, make_partition, notes, split
from fedstill.data.augment import list_augmentations
from fedstill.errors import InputError
from fedstill.execution import Executor, SerialExecutor, ThreadExecutor
from fedstill.federation import EvaluationSets, Federation
from fedstill.methods.base import FederationInfo, Method
from fedstill.methods.registry import compose
from fedstill.methods.scaffold import ScaffoldObjective, fixed_steps
from fedstill.models import Stateless, batch_norms, build_model, check_width, find_head, split_state
from fedstill.models.randomness import random_layers
from fedstill.names import unknown
from fedstill.rng import numpy_stream, torch_stream
from fedstill.weights import Weights


def resolve(config: Config) -> Config:
    """Return the configuration with every ``auto`` made definite, by a fixed table and never by a timing."""
    execution = config.execution
    device = execution.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("execution.device = 'cuda', but PyTorch sees no CUDA device here")
    executor = execution.executor
    if executor == "auto":
        executor = "threads" if device == "cpu" else "serial"
    workers = execution.workers or os.cpu_count() or 1
    resolved = execution.model_copy(update={"device": device, "executor": executor, "workers": workers})
    return config.model_copy(update={"execution": resolved})


def build(config: Config) -> tuple[Federation, list[str]]:
    """Return the federation that a configuration describes, and notes worth showing.

    Raises
    ------
    InputError
        For anything that cannot work; nothing has been written.
    """
    config = resolve(config)
    method = compose(config)
    if config.data.augment not in dict(list_augmentations()):
        raise unknown("augmentation (data.augment)", config.data.augment, dict(list_augmentations()))
    raw = load_raw(config.data.name, Path(config.data.root) if config.data.root else None)
    splits = split(
        raw,
        train_samples=config.data.train_samples,
        test_samples=config.data.test_samples,
        server_validation=config.data.server_validation,
        seed=config.seed.data,
    )
    partition = partition_of(config, splits, raw.num_classes)
    parts = client_parts(partition, config.data.client_validation, config.data.client_test, config.seed.data)
    shares = [torch.from_numpy(train) for train, _, _ in parts]
    held = [[*validation, *test] for _, validation, test in parts]
    device = torch.device(config.execution.device)
    stateless, initial, head = model_of(config, tuple(raw.shape), raw.num_classes)
    info = FederationInfo(tuple(len(share) for share in shares), raw.num_classes, tuple(raw.shape), head)
    if config.fusion.head == "class-weighted" and head is None:
        raise InputError("fusion.head = 'class-weighted' needs a linear head: name it with model.head")
    config = with_fixed_steps(config, method, info)
    check_batches(config, stateless, info)
    for refinement in method.refinements:
        refinement.check(stateless, info)
    trained_on = [np.bincount(splits.train.y.numpy()[train], minlength=raw.num_classes) for train, _, _ in parts]
    said = notes(replace(partition, counts=np.stack(trained_on)), raw.class_names, config.local.batch_size)
    if kinds := random_layers(stateless.module):
        config = config.model_copy(update={"execution": config.execution.model_copy(update={"executor": "serial"})})
        said.append(
            f"{config.model.name} has {', '.join(kinds)}, which draw from one random stream of the whole process: "
            f"clients are trained one after another"
        )
    stateless.module.to(device)
    train = splits.train.to(device)
    trainer = LocalTrainer(
        method.objective, train, shares, config.local, raw.num_classes, config.seed.train, config.data.augment
    )
    own = [train.take(torch.tensor(rows, dtype=torch.int64).to(device)) for rows in held]
    sets = evaluation_sets(config, splits, own, device)
    initial = initial.to(device)
    executor = executor_of(config, stateless, len(shares))
    federation = Federation(config, method, info, partition, stateless, initial, trainer, executor, sets, device)
    return federation, said


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
        replay=data.replay,
        seed=config.seed.data,
    )


def model_of(config: Config, shape: tuple[int, ...], num_classes: int) -> tuple[Stateless, Weights, str | None]:
    """Return the architecture, its initial weights and the name of its head (None where it has none)."""
    model = config.model
    module = build_model(
        model.name,
        input_shape=shape,
        num_classes=num_classes,
        norm=model.norm,
        norm_groups=model.norm_groups,
        stem=model.stem,
        width=model.width,
        hidden=model.hidden,
        generator=torch_stream(config.seed.train, "initial-weights"),
    )
    check_width(module, shape, num_classes)
    try:
        head = find_head(module, num_classes, model.head)
    except InputError:
        if model.head is not None:
            raise
        head = None
    params, buffers = split_state(module)
    return Stateless(module), Weights(params, buffers), head


def with_fixed_steps(config: Config, method: Method, info: FederationInfo) -> Config:
    """Return the configuration with the same number of local steps for all, where SCAFFOLD's code form asks for it."""
    objective = method.objective
    fixed = isinstance(objective, ScaffoldObjective) and objective.settings.steps == "fixed"
    if not fixed or config.local.steps is not None:
        return config
    steps = fixed_steps(info, config.local.batch_size, config.local.epochs)
    return config.model_copy(update={"local": config.local.model_copy(update={"steps": steps})})


def check_batches(config: Config, model: Stateless, info: FederationInfo) -> None:
    """Refuse a BatchNorm model where a batch would hold one sample."""
    if not batch_norms(model.module):
        return
    size = config.local.batch_size
    alone = [client for client, samples in enumerate(info.samples) if size == 1 or samples % size == 1]
    if alone:
        raise InputError(
            f"client {alone[0]} holds {info.samples[alone[0]]} samples, so that with local.batch_size = {size} "
            f"BatchNorm would see a batch of one; choose another batch size, or model.norm = 'gn'"
        )


def evaluation_sets(config: Config, splits: Splits, own: list[Samples], device: torch.device) -> EvaluationSets:
    """Return what models are measured on."""
    wanted = config.eval.on
    sets: dict[str, Samples] = {}
    if "test" in wanted:
        sets["test"] = splits.test.to(device)
    if "validation" in wanted:
        if not len(splits.server_validation):
            raise InputError("eval.on has 'validation', but data.server_validation is 0")
        sets["validation"] = splits.server_validation.to(device)
    if "clients" in wanted and not any(len(part) for part in own):
        raise InputError("eval.on has 'clients', but data.client_validation and data.client_test are 0")
    measured = sets.get("test", sets.get("validation"))
    if measured is not None and len(measured) > config.eval.ensemble_samples:
        stream = numpy_stream(config.seed.data, "ensemble-samples")
        chosen = stream.choice(len(measured), config.eval.ensemble_samples, replace=False)
        measured = measured.take(torch.from_numpy(chosen).to(device))
    return EvaluationSets(sets, own if "clients" in wanted else None, measured)


def executor_of(config: Config, model: Stateless, clients: int) -> Executor:
    """Return the executor of a resolved configuration."""
    execution = config.execution
    if execution.executor == "threads":
        workers = min(execution.workers or 1, clients)
        return ThreadExecutor(model, workers, execution.intra_op_threads)
    return SerialExecutor(model, execution.intra_op_threads)
