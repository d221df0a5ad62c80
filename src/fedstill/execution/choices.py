"""What a configuration leaves open of how it is computed: the device, the executor, the layout, where states wait."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from fedstill.client import LocalTrainer
from fedstill.config import Config
from fedstill.errors import InputError
from fedstill.execution import Executor, SerialExecutor, ThreadExecutor
from fedstill.execution.processes import ProcessExecutor, why_no_processes
from fedstill.execution.vectorized import Steps, VectorizedExecutor, why_not
from fedstill.federation import Architecture, cohort_size
from fedstill.methods.base import LocalObjective
from fedstill.models import Stateless
from fedstill.models.fedmd import SameAveragePool
from fedstill.models.randomness import random_layers
from fedstill.weights import Weights


def resolve(config: Config) -> Config:
    """Return the configuration with every ``auto`` made definite, by a fixed table and never by a timing."""
    execution = config.execution
    device = execution.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("execution.device = 'cuda', but PyTorch sees no CUDA device here")
    if execution.cuda_graphs and device != "cuda":
        raise InputError("execution.cuda_graphs needs a GPU; leave the key out on a CPU")
    executor = execution.executor
    if executor == "processes" and device != "cpu":
        raise InputError("execution.executor = 'processes' trains on a CPU; take vectorized (or auto) on a GPU")
    if executor == "auto":
        executor = "threads" if device == "cpu" and not execution.compile else "vectorized"
    if execution.compile and executor != "vectorized":
        raise InputError(f"execution.compile: executor = {executor!r} has no step to compile; take vectorized, or auto")
    workers = execution.workers or os.cpu_count() or 1
    resolved = execution.model_copy(update={"device": device, "executor": executor, "workers": workers})
    return config.model_copy(update={"execution": resolved})


def device_of(config: Config) -> torch.device:
    """Return the device of a resolved configuration."""
    return torch.device(config.execution.device)


def with_possible_executor(
    config: Config, objective: LocalObjective, models: Sequence[Stateless], shape: tuple[int, ...]
) -> tuple[Config, list[str]]:
    """Return the configuration with ``serial`` where these models allow nothing else, and a note that says why."""
    if kinds := sorted({kind for model in models for kind in random_layers(model.module)}):
        return with_executor(config, "serial"), [
            f"the model has {', '.join(kinds)}, which draw from one random stream of the whole process: "
            f"clients are trained one after another"
        ]
    if config.execution.executor == "vectorized":
        reasons = [why_not(objective, model, shape) for model in models]
        if found := [reason for reason in reasons if reason]:
            return with_executor(config, "serial"), [
                f"{config.method} cannot be vectorized here: {found[0]}; clients are trained one after another"
            ]
    return config, []


STEPS_THAT_PAY = 20_000
"""From so many local steps on, processes for small models repay the seconds that they take to start."""


def with_processes(
    config: Config, left_to_us: bool, train: LocalTrainer, models: Sequence[Stateless]
) -> tuple[Config, list[str]]:
    """Return the configuration with ``processes`` or without, and a note where they were asked for and cannot be.

    Threads share Python's lock. Measured on two cores: a perceptron's step holds it most of the time, a convolution
    runs without it.
    """
    execution = config.execution
    if left_to_us:
        cohort = cohort_size(config.train.participation, len(train.shares))
        mean = sum(train.steps_of(client) for client in range(len(train.shares))) / len(train.shares)
        convolves = any(isinstance(part, nn.Conv2d) for model in models for part in model.module.modules())
        several = execution.executor == "threads" and min(execution.workers or 1, cohort) > 1
        long = config.train.rounds * cohort * mean >= STEPS_THAT_PAY
        if several and long and not convolves and not why_no_processes(train, models):
            return with_executor(config, "processes"), []
    elif execution.executor == "processes" and (why := why_no_processes(train, models)):
        return with_executor(config, "threads"), [f"no processes here: {why}; clients are trained on threads"]
    return config, []


def with_executor(config: Config, executor: Literal["serial", "threads", "processes"]) -> Config:
    """Return the configuration with another executor."""
    return config.model_copy(update={"execution": config.execution.model_copy(update={"executor": executor})})


def executor_of(config: Config, models: Sequence[Stateless], clients: int) -> Executor:
    """Return the executor of a resolved configuration."""
    execution = config.execution
    workers = min(execution.workers or 1, clients)
    bf16 = execution.precision == "bf16"
    if execution.executor == "threads":
        return ThreadExecutor(models, workers, execution.intra_op_threads, bf16)
    if execution.executor == "processes":
        useful = min(workers, cohort_size(config.train.participation, clients))
        return ProcessExecutor(models, useful, execution.intra_op_threads, bf16)
    serial = SerialExecutor(models, execution.intra_op_threads, bf16)
    if execution.executor == "vectorized":
        several = workers > 1 and execution.device == "cpu"
        inner = ThreadExecutor(models, workers, execution.intra_op_threads, bf16) if several else serial
        steps = Steps(execution.compile)
        return VectorizedExecutor(inner, workers if several else 1, execution.clients_at_once, steps)
    return serial


def with_memory_format(config: Config, models: Sequence[Stateless]) -> Config:
    """Return the configuration with the layout of images and kernels.

    Measured on a CPU: with the channels innermost, convolutions of few channels are faster and a maximum pooling takes
    a fraction of its time, a third of a small CNN's step otherwise; GroupNorm is slower. Three poolings pay for three
    GroupNorms (0.73 to 0.86 of the time), the one of a ResNet does not for its twenty (1.06), and without any there is
    nothing to gain (FedGen's CNN 1.1 to 1.3, a ResNet with BatchNorm and the CIFAR stem 1.0).
    """
    execution = config.execution
    if execution.memory_format != "auto":
        return config
    parts = [part for model in models for part in model.module.modules()]
    convolves = any(isinstance(part, nn.Conv2d) for part in parts)
    grouped = sum(isinstance(part, nn.GroupNorm) for part in parts)
    pooled = sum(isinstance(part, (nn.MaxPool2d, nn.AvgPool2d, SameAveragePool)) for part in parts)
    pays = execution.device == "cpu" and convolves and pooled >= max(grouped, 1)
    chosen = "channels_last" if pays else "contiguous"
    return config.model_copy(update={"execution": execution.model_copy(update={"memory_format": chosen})})


def set_products_of_float32(config: Config) -> None:
    """Tell PyTorch whether a GPU may round the factors of float32 products to TF32; by itself it does in convolutions.

    Raises
    ------
    InputError
        For TF32 without a GPU.
    """
    if config.execution.device == "cuda":
        allowed = config.execution.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    elif config.execution.precision == "tf32":
        raise InputError("execution.precision: tf32 needs a GPU; float32 and bf16 run on a CPU")


MEMORY_PART = 10
"""Above this part of the device's memory, a tenth, ``execution.client_states = "auto"`` means disk."""


def with_client_states(config: Config, architectures: Sequence[Architecture], device: torch.device) -> Config:
    """Return the configuration with the place where absent clients' states wait.

    What a client keeps is known only once it has kept it. It is taken to be one model, and one more where its last
    upload is kept too; of the methods here FedMD keeps most, its model and two Adams, which still goes into a half.
    """
    execution = config.execution
    if execution.client_states != "auto":
        return config
    copies = 2 if "all" in config.eval.models else 1
    expected = copies * sum(one.info.size * bytes_of(one.initial) for one in architectures)
    chosen = "disk" if expected * MEMORY_PART > memory_of(device) else "memory"
    return config.model_copy(update={"execution": execution.model_copy(update={"client_states": chosen})})


def bytes_of(weights: Weights) -> int:
    """Return the size of a model."""
    return sum(value.nbytes for value in (*weights.params.values(), *weights.buffers.values()))


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has; 8 GiB where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 * 2**30
