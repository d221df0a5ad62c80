"""A folder of models that have learnt the public set, each under everything that determines it, bit for bit.

FedMD's transfer learning begins with the public set, and that phase is the same in every run with the same public
samples, architecture, initial weights and keys, whatever the private data are. A file's name is a digest of all that;
what has another digest is another file. So nothing in the folder is ever out of date, and any of it may be removed.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from fedstill.models.randomness import own_stream, random_layers
from fedstill.models.stateless import Stateless
from fedstill.runs.files import disk_errors, sha256
from fedstill.runs.store import grouped, ungrouped
from fedstill.tensor_bytes import dump_tensors, load_tensors
from fedstill.weights import Tensors, Weights

STEPS = ("adam", "methods.fedmd", "models.layers", "models.stateless", "training")
"""Modules of fedstill that say what a step computes, whatever the architecture."""
DIGEST = 64
"""Letters of a SHA-256."""


@dataclass(frozen=True)
class Pretrained:
    """A model after the public set.

    Parameters
    ----------
    weights : Weights
    steps : int
        How many it took.
    layers : Tensor or None
        State of the random stream of the model's layers, which go on with it; None where they draw nothing.
    """

    weights: Weights
    steps: int
    layers: Tensor | None


@dataclass(frozen=True)
class PretrainingCache:
    """The folder.

    Files are written under a name of their own and renamed: processes may share it, and of two that learn the same
    thing at the same time the second writes the same bytes again.
    """

    folder: Path

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.pretrained"

    def load(self, key: str) -> Pretrained | None:
        """Return what is stored under a key, None for nothing.

        Raises
        ------
        ValueError
            If the file is not what was written; it says which and why.
        """
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
        digest, content = data[:DIGEST], data[DIGEST:]
        if sha256(content).encode() != digest:
            raise ValueError(f"{path} is damaged, its SHA-256 is not its own")
        state = ungrouped(load_tensors(content), "")
        steps = int(state["done"]["steps"])
        return Pretrained(Weights(state["params"], state.get("buffers", {})), steps, state["done"].get("layers"))

    def store(self, key: str, one: Pretrained) -> None:
        """Write a model under its key; a RunError where the disk refuses."""
        done = {"steps": torch.tensor(one.steps)} | ({} if one.layers is None else {"layers": one.layers})
        state = {"params": one.weights.params, "buffers": one.weights.buffers, "done": done}
        content = dump_tensors(grouped("", state))
        with disk_errors(self.folder):
            number, partial = tempfile.mkstemp(suffix=".partial", dir=self.folder)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(sha256(content).encode() + content)
                    file.flush()
                    os.fsync(file.fileno())
                Path(partial).replace(self.path(key))
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise

    def make_folder(self) -> None:
        """Make the folder, before hours are spent on what goes into it."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)


def key_of(model: Stateless, initial: Weights, x: Tensor, y: Tensor, keys: Mapping[str, object]) -> str:
    """Return the digest of everything that determines a model after the public set.

    Parameters
    ----------
    model : Stateless
        The architecture; the random stream of its layers counts as it stands.
    initial : Weights
        What it starts from.
    x, y : Tensor
        The public samples, in their order.
    keys : mapping
        Name -> value of what else a step or their order depends on.
    """
    module, stream = model.module, own_stream(model.module)
    known = {
        "keys": {name: repr(value) for name, value in keys.items()},
        "initial": digest({f"{kind}/{name}": one for kind, own in vars(initial).items() for name, one in own.items()}),
        "public": digest({"x": x, "y": y}),
        "layers": digest({"stream": stream.get_state()}) if stream else "",
        "model": [repr(module), model.head_name],
        "program": [version("fedstill"), torch.__version__, *map(source_digest, sorted(sources(module)))],
        "machine": machine(x.device),
    }
    return blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=20).hexdigest()


def why_not(module: nn.Module) -> str | None:
    """Say why a model after the public set cannot be stored; None where it can."""
    if kinds := random_layers(module):
        return f"{', '.join(kinds)} draw from the one random stream of the whole process"
    for name in sources(module):
        try:
            inspect.getsource(sys.modules[name])
        except (OSError, TypeError, KeyError):
            return f"the source of {name} cannot be read, so that nobody could tell whether it has changed"
    return None


def digest(tensors: Tensors) -> str:
    """Return a digest of names, types, shapes and bytes."""
    found = blake2b(digest_size=32)
    for name, value in tensors.items():
        found.update(repr((name, value.dtype, tuple(value.shape))).encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sources(module: nn.Module) -> set[str]:
    """Return the Python modules whose text says what a step computes, PyTorch's own left out."""
    layers = {type(part).__module__ for part in module.modules()}
    return {f"fedstill.{name}" for name in STEPS} | {name for name in layers if name.partition(".")[0] != "torch"}


def source_digest(name: str) -> str:
    """Return the digest of a Python module's text."""
    return sha256(inspect.getsource(sys.modules[name]).encode())


def machine(device: torch.device) -> list[object]:
    """Return what rounding depends on: the processor, the threads inside an operation, the precision of products."""
    cuda = device.type == "cuda"
    return [
        torch.cuda.get_device_name(device) if cuda else processor(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "",
        [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32] if cuda else [],
    ]


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not on Linux
        return platform.processor() or platform.machine()
