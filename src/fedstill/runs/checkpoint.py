"""Checkpoints: everything that the next round depends on, as safetensors and JSON.

``checkpoints/round-00003.safetensors`` holds the server's tensors; :mod:`fedstill.runs.store` says where the clients'
are. ``checkpoints/round-00003.json``, written last, names the server's file and the index of the clients' files, with
their SHA-256. A round writes its cohort's files and lines only; what no kept checkpoint needs is removed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedstill.errors import InputError
from fedstill.federation import FederationState, GlobalModel
from fedstill.methods.base import ServerState
from fedstill.runs.files import disk_errors, write_atomically
from fedstill.runs.store import (
    ClientFiles,
    ClientIndex,
    StoredState,
    grouped,
    read_tensors,
    under,
    ungrouped,
    write_tensors,
)
from fedstill.weights import Tensors, Weights

FORMAT = "fedstill-checkpoint-4"


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
    client_states : {"memory", "disk"}
        Whether clients' states stay in memory too, or lie in their files until they are needed.
    holds : tuple of (int, int), optional
        How many models, and refinements of each, the run's states have; by default what a checkpoint says is believed.
    """

    root: Path
    keep: int
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    client_states: Literal["memory", "disk"] = "memory"
    holds: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.files = ClientFiles(self.root, self.device)
        self._index = ClientIndex(self.root)
        self._counted: set[int] = set()
        self._swept = False

    def save(self, state: FederationState) -> FederationState:
        """Write a checkpoint of ``state`` and remove what is no longer needed.

        Returns
        -------
        FederationState
            The same to go on with: it knows what is written, and holds no more than it has to.
        """
        name = f"round-{state.round:05d}"
        clients = self.files.put(state.clients, state.round, self.client_states == "disk")
        server = f"checkpoints/{name}.safetensors"
        digest = write_tensors(self.root / server, _server_tensors(state))
        manifest = {
            "format": FORMAT,
            "round": state.round,
            "fingerprint": self.fingerprint,
            "models": len(state.models),
            "refinements": len(state.refinements),
            "server": {"file": server, "sha256": digest},
            "clients": self._listed(state),
        }
        write_atomically(self.root / f"checkpoints/{name}.json", json.dumps(manifest, indent=1).encode())
        self.files.unlisted.clear()
        self._counted = set(state.label_counts)
        self._remove_old(state.round)
        return replace(state, clients=clients)

    def load(self) -> FederationState | None:
        """Return the newest checkpoint's state, None where there is no checkpoint.

        Raises
        ------
        InputError
            For a corrupt or foreign checkpoint; it names the file, and an older one that could be used. With client
            states on disk a client's file is checked when it is read.
        """
        found = manifests(self.root)
        if not found:
            return None
        try:
            return self._load(found[-1])
        except InputError as error:
            older = [place for place, path in enumerate(found[:-1]) if self._is_own(path)]
            if not older:
                raise
            later = " and ".join(map(str, found[older[-1] + 1 :]))
            raise InputError(f"{error}; to go on from {found[older[-1]].stem} instead, remove {later}") from error

    def _manifest(self, path: Path) -> dict[str, Any]:
        """Read what a checkpoint names, if it is of this run."""
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            form, fingerprint = manifest["format"], manifest["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
        if form != FORMAT:
            raise InputError(f"{path}: format {form!r}, expected {FORMAT!r}")
        if fingerprint != self.fingerprint:
            raise InputError(
                f"{path}: it belongs to another experiment than config.toml beside it describes; where that was "
                f"edited, put it back as it was, and run what it says now in another directory"
            )
        return manifest

    def _is_own(self, path: Path) -> bool:
        try:
            self._manifest(path)
        except InputError:
            return False  # what is wrong with the newest one is told
        return True

    def _load(self, path: Path) -> FederationState:
        manifest = self._manifest(path)
        try:
            round, models, refinements = (int(manifest[key]) for key in ("round", "models", "refinements"))
            server = self.root / str(manifest["server"]["file"])
            tensors = read_tensors(server, str(manifest["server"]["sha256"]), self.device)
            self._check_counts(path, (round, models, refinements), tensors)
            self._index, live, counts = self._indexed(manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
        clients = self.files.opened(live, self.client_states == "disk")
        self._counted, self._swept = set(counts), False
        return FederationState(
            round,
            tuple(_global_model(under(tensors, f"model-{place}/"), refinements) for place in range(models)),
            clients,
            counts,
        )

    def _check_counts(self, path: Path, said: tuple[int, int, int], tensors: Tensors) -> None:
        """Refuse a manifest whose round is not its name's, or whose counts are not those of the tensors or the run."""
        round, models, refinements = said
        if round != round_of(path):
            raise InputError(f"{path}: a damaged checkpoint: it says round {round}")
        places = [(int(model), int(kept or -1)) for model, kept in map(_place_of, tensors)]
        lost = any(model >= models or kept >= refinements for model, kept in places)
        if lost or self.holds not in (None, (models, refinements)):
            raise InputError(f"{path}: a damaged checkpoint: it says {models} model(s) of {refinements} refinement(s)")

    def _listed(self, state: FederationState) -> dict[str, Any]:
        """Write the index's lines of a checkpoint: a client's newest file, or its label counts."""

        def lines(files: dict[int, StoredState], counted: set[int]) -> list[Any]:
            found: list[Any] = [{"client": k, "round": one.round, "sha256": one.sha256} for k, one in files.items()]
            return found + [{"client": k, "label_counts": state.label_counts[k].tolist()} for k in sorted(counted)]

        known = state.label_counts.keys()
        return self._index.add(
            lines(self.files.unlisted, known - self._counted),
            lambda: lines(self.files.live, set(known)),
            len(self.files.live) + len(known),
            state.round,
        )

    def _indexed(self, manifest: dict[str, Any]) -> tuple[ClientIndex, dict[int, StoredState], dict[int, Tensor]]:
        """Read the index that a checkpoint names: client -> its file, client -> its label counts."""
        index, lines = ClientIndex.read(self.root, manifest["clients"])
        live: dict[int, StoredState] = {}
        counts: dict[int, Tensor] = {}
        for line in lines:
            client = int(line["client"])
            if "label_counts" in line:
                counts[client] = torch.tensor(line["label_counts"], dtype=torch.int64)
            else:
                live[client] = StoredState(self.root, client, int(line["round"]), str(line["sha256"]), self.device)
        return index, live, counts

    def _remove_old(self, round: int) -> None:
        kept = manifests(self.root)[-self.keep :]
        named = set(kept)
        rounds: list[int] = []
        files: list[StoredState] = []
        for path in kept:
            try:
                manifest = json.loads(path.read_text())
                named |= {self.root / manifest[part]["file"] for part in ("server", "clients")}
                rounds.append(int(manifest["round"]))
                if not self._swept:
                    files += self._indexed(manifest)[1].values()
            except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # an older one that is damaged; nobody can go on from it
        with disk_errors(self.root):
            for path in (self.root / "checkpoints").glob("*-*"):
                if path not in named:
                    path.unlink()
        if not self._swept:
            self.files.sweep(files, round)
            self._swept = True
        self.files.remove(rounds)


def manifests(root: Path) -> list[Path]:
    """Return the files that name a run's checkpoints, the newest last."""
    found = (file for file in (root / "checkpoints").glob("round-*.json") if file.stem[len("round-") :].isdecimal())
    return sorted(found, key=round_of)


def round_of(manifest: Path) -> int:
    """Return the round after which a checkpoint was written."""
    return int(manifest.stem.removeprefix("round-"))


def newest_state(root: Path) -> FederationState | None:
    """Return the state of a run's newest checkpoint to look at, on the CPU; None where there is none.

    Nothing but the run itself is asked what experiment it is: to go on with it, :class:`CheckpointStore` compares.
    Clients' files are opened when they are read.

    Raises
    ------
    InputError
        For a corrupt checkpoint.
    """
    store = CheckpointStore(root, 1, "", client_states="disk")
    found = manifests(root)
    if not found:
        return None
    try:
        store.fingerprint = str(json.loads(found[-1].read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{found[-1]}: not a checkpoint, or a damaged one") from error
    return store.load()


def _server_tensors(state: FederationState) -> Tensors:
    tensors: Tensors = {}
    for place, model in enumerate(state.models):
        own = {f"params/{name}": value for name, value in model.server.weights.params.items()}
        own |= {f"buffers/{name}": value for name, value in model.server.weights.buffers.items()}
        own |= grouped("method/", model.server.method)
        for index, kept in enumerate(model.refinements):
            own |= grouped(f"refinement-{index}/", kept)
        tensors |= {f"model-{place}/{name}": value for name, value in own.items()}
    return tensors


def _place_of(name: str) -> tuple[str, str | None]:
    """Return the model that a tensor of the server belongs to, and the refinement that keeps it, if one does."""
    found = re.match(r"model-(\d+)/(?:refinement-(\d+)/)?", name)
    if not found:
        raise ValueError(f"{name} is no tensor of a checkpoint")
    return found[1], found[2]


def _global_model(tensors: Tensors, refinements: int) -> GlobalModel:
    weights = Weights(under(tensors, "params/"), under(tensors, "buffers/"))
    server = ServerState(weights, ungrouped(tensors, "method/"))
    return GlobalModel(server, tuple(ungrouped(tensors, f"refinement-{index}/") for index in range(refinements)))
