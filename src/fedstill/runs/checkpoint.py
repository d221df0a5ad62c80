"""Checkpoints: everything that the next round depends on, as safetensors and JSON.

``checkpoints/round-00003.safetensors`` holds the server's tensors, ``clients/7/round-00003.safetensors`` the state
that client 7 left in round 3, written once. ``checkpoints/round-00003.json``, written last, names the files and
their SHA-256. A round writes its cohort's files only; those that no kept checkpoint names are removed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedstill.errors import InputError
from fedstill.federation import FederationState, GlobalModel
from fedstill.methods.base import ServerState
from fedstill.runs.files import disk_errors, sha256, write_atomically
from fedstill.weights import State, Tensors, Weights

FORMAT = "fedstill-checkpoint-2"


@dataclass
class CheckpointStore:
    """The checkpoints of one run directory.

    Parameters
    ----------
    root : Path
        The run directory.
    keep : int
        How many checkpoints stay.
    fingerprint : str
        Of what the run computes; a checkpoint with another one is foreign.
    device : torch.device
        Where tensors are put when they are read; label counts stay on the CPU.
    """

    root: Path
    keep: int
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _written: dict[int, dict[str, str]] = field(default_factory=dict)
    _states: dict[int, State] = field(default_factory=dict)

    def save(self, state: FederationState) -> None:
        """Write a checkpoint of ``state`` and remove what is no longer needed."""
        name = f"round-{state.round:05d}"
        for client, own in state.clients.items():
            if own is not self._states.get(client):
                path = f"clients/{client}/{name}.safetensors"
                self._written[client] = self._write(path, _grouped("", own))
                self._states[client] = own
        manifest = {
            "format": FORMAT,
            "round": state.round,
            "fingerprint": self.fingerprint,
            "models": len(state.models),
            "refinements": len(state.refinements),
            "server": self._write(f"checkpoints/{name}.safetensors", _server_tensors(state)),
            "clients": {str(client): entry for client, entry in sorted(self._written.items())},
        }
        write_atomically(self.root / f"checkpoints/{name}.json", json.dumps(manifest, indent=1).encode())
        self._remove_old()

    def load(self) -> FederationState | None:
        """Return the newest checkpoint's state, None where there is no checkpoint.

        Raises
        ------
        InputError
            For a corrupt or foreign checkpoint; it names the file, and an older one that could be used.
        """
        manifests = self._manifests()
        if not manifests:
            return None
        try:
            return self._load(manifests[-1])
        except InputError as error:
            older = f"; to go on from {manifests[-2].stem} instead, remove {manifests[-1]}" if manifests[1:] else ""
            raise InputError(f"{error}{older}") from error

    def _load(self, path: Path) -> FederationState:
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            form, fingerprint = manifest["format"], manifest["fingerprint"]
            round = int(manifest["round"])
            models, refinements = int(manifest["models"]), int(manifest["refinements"])
            server = _entry(manifest["server"])
            clients = {int(client): _entry(entry) for client, entry in manifest["clients"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
        if form != FORMAT:
            raise InputError(f"{path}: format {form!r}, expected {FORMAT!r}")
        if fingerprint != self.fingerprint:
            raise InputError(f"{path}: it belongs to another experiment than config.toml beside it describes")
        tensors = self._read(server)
        self._written = clients
        self._states = {client: _state(self._read(entry), "") for client, entry in clients.items()}
        return FederationState(
            round,
            tuple(_global_model(_under(tensors, f"model-{place}/"), refinements) for place in range(models)),
            dict(self._states),
            {int(client): counts.cpu() for client, counts in _under(tensors, "label-counts/").items()},
        )

    def _write(self, name: str, tensors: Tensors) -> dict[str, str]:
        # Copies: safetensors refuses tensors that share memory, as the global model and SCAFFOLD's fused one may.
        copies = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
        }
        data = save(copies)
        write_atomically(self.root / name, data)
        return {"file": name, "sha256": sha256(data)}

    def _read(self, entry: dict[str, str]) -> Tensors:
        path = self.root / entry["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: a checkpoint names this file, and it cannot be read") from error
        if sha256(data) != entry["sha256"]:
            raise InputError(f"{path}: corrupt: its SHA-256 is not the one in the checkpoint")
        try:
            tensors: dict[str, Tensor] = load(data)
        except SafetensorError as error:
            raise InputError(f"{path}: not a safetensors file ({error})") from error
        return {name: value.to(self.device) for name, value in tensors.items()}

    def _manifests(self) -> list[Path]:
        found = (self.root / "checkpoints").glob("round-*.json")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def _remove_old(self) -> None:
        kept = self._manifests()[-self.keep :]
        named = set(kept)
        for path in kept:
            try:
                manifest = json.loads(path.read_text())
                entries = [_entry(entry) for entry in (manifest["server"], *manifest["clients"].values())]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # an older one that is damaged; nobody can go on from it
            named |= {self.root / entry["file"] for entry in entries}
        with disk_errors(self.root):
            for folder in ("checkpoints", "clients"):
                for path in (self.root / folder).rglob("round-*"):
                    if path not in named:
                        path.unlink()


def _entry(entry: Any) -> dict[str, str]:
    return {"file": str(entry["file"]), "sha256": str(entry["sha256"])}


def _server_tensors(state: FederationState) -> Tensors:
    tensors = {f"label-counts/{client}": counts for client, counts in state.label_counts.items()}
    for place, model in enumerate(state.models):
        own = {f"params/{name}": value for name, value in model.server.weights.params.items()}
        own |= {f"buffers/{name}": value for name, value in model.server.weights.buffers.items()}
        own |= _grouped("method/", model.server.method)
        for index, kept in enumerate(model.refinements):
            own |= _grouped(f"refinement-{index}/", kept)
        tensors |= {f"model-{place}/{name}": value for name, value in own.items()}
    return tensors


def _global_model(tensors: Tensors, refinements: int) -> GlobalModel:
    weights = Weights(_under(tensors, "params/"), _under(tensors, "buffers/"))
    server = ServerState(weights, _state(tensors, "method/"))
    return GlobalModel(server, tuple(_state(tensors, f"refinement-{index}/") for index in range(refinements)))


def _grouped(prefix: str, state: State) -> Tensors:
    return {f"{prefix}{group}/{name}": value for group, tensors in state.items() for name, value in tensors.items()}


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _state(tensors: Tensors, prefix: str) -> State:
    state: State = {}
    for key, value in _under(tensors, prefix).items():
        group, _, name = key.partition("/")
        state.setdefault(group, {})[name] = value
    return state
