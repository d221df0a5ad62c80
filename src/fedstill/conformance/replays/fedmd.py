"""FedMD: whole rounds of a client and of the server, with the recorded subsets and orders in place of drawn ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from fedstill.adam import Adam
from fedstill.client import Site
from fedstill.config import LocalSettings
from fedstill.conformance.replays.registry import Case, must, replays
from fedstill.conformance.replays.sites import over_the_wire
from fedstill.conformance.replays.subjects import as_recorded, inside
from fedstill.conformance.subject import Subject
from fedstill.data.dataset import Samples
from fedstill.methods import fedmd
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, Turn, Upload
from fedstill.models import Stateless, split_state
from fedstill.models.fedmd import fedmd_cnn
from fedstill.payload import Kind
from fedstill.weights import State, Weights


@dataclass(frozen=True)
class Party:
    """A participant of the case: its model in float64, and the places of the case's flat state in it."""

    model: Stateless
    names: list[str]

    @staticmethod
    def of(case: Case, number: int) -> Party:
        """Return a participant."""
        described = case.meta["architectures"][f"party_{number}"]
        widths = tuple(
            e["shape"][0] for e in described["layout"] if e["name"].startswith("conv") and "weight" in e["name"]
        )
        with torch.random.fork_rng(devices=[]):
            module = fedmd_cnn(tuple(described["input"]), case.hyper["classes"], widths=widths, dropout=0.0).double()
        names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
        shapes = [list(module.state_dict()[name].shape) for name in names]
        must(shapes == [entry["shape"] for entry in described["layout"]], f"party {number} is laid out otherwise")
        return Party(Stateless(module, "head"), names)

    def weights(self, flat: Tensor) -> Weights:
        """Return a flat state as weights."""
        weights = Weights(*split_state(self.model.module))
        sizes = [{**weights.params, **weights.buffers}[name].numel() for name in self.names]
        for name, part in zip(self.names, torch.split(flat, sizes), strict=True):
            group = weights.params if name in weights.params else weights.buffers
            group[name] = part.reshape(group[name].shape).clone()
        return weights

    def flat(self, weights: Weights) -> Tensor:
        """Return weights as a flat state."""
        return torch.cat([{**weights.params, **weights.buffers}[name].reshape(-1) for name in self.names])


@dataclass
class Recorded:
    """The orders of one party's round, and the model after each lesson of it."""

    digest: Tensor
    revisit: Tensor
    samples: int
    seen: list[tuple[str, Weights]] = field(default_factory=list)

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Let FedMD take these orders in place of drawn ones, and whole subsets in their order."""
        study = fedmd.Learner.study

        def order(
            samples: int, size: int, steps: int, generator: torch.Generator, device: torch.device
        ) -> Iterator[Tensor]:
            found = self.digest if samples == self.samples else self.revisit
            must((len(found), -(-samples // size)) == (samples, steps), "another number of steps")
            yield from torch.split(found.to(device), size)

        def studied(learner: fedmd.Learner, site: Site, lesson: fedmd.Lesson, moments: State) -> list[Tensor]:
            losses = study(learner, site, lesson, moments)
            self.seen.append((lesson.name, learner.weights.clone()))
            return losses

        def subset(labels: Tensor, number: int, seed: int, round: int) -> Tensor:
            return torch.arange(self.samples) + round * self.samples

        with (
            patch.object(fedmd, "batches", order),
            patch.object(fedmd, "alignment_subset", subset),
            patch.object(fedmd.Learner, "study", studied),
        ):
            yield


def as_in(case: Case, subject: Subject) -> tuple[fedmd.FedMDObjective, fedmd.FedMDFusion]:
    """Return the built-in method's parts with a case's settings."""
    for part, kind in zip(subject.parts(), (fedmd.FedMDObjective, fedmd.FedMDFusion)):
        inside(part, kind)
    digest, revisit = case.hyper["digest"], case.hyper["revisit"]
    parts = as_recorded(
        subject,
        "code",
        align_samples=case.array("in/x_public").shape[1],
        digest_epochs=digest["epochs"],
        digest_batch_size=digest["batch"],
        revisit_epochs=revisit["epochs"],
        revisit_batch_size=revisit["batch"],
    ).parts()
    objective, fusion = inside(parts[0], fedmd.FedMDObjective), inside(parts[1], fedmd.FedMDFusion)
    adam, wanted = objective.settings.optimiser(), case.hyper["adam"]
    same = (adam.lr, list(adam.betas), adam.epsilon) == (wanted["lr"], wanted["betas"], wanted["eps"])
    must(adam.keras and same, "another Adam")
    return objective, fusion


def begun(case: Case, net: Party, number: int, settings: fedmd.FedMDSettings) -> State:
    """Return a participant's state after the transfer learning, with fresh Adams, where the case begins."""
    weights = net.weights(case.tensor(f"in/w0_{number}"))
    digest, private = (Adam.start(weights.params) for _ in range(2))
    return fedmd.Learner(net.model, weights, settings, digest, private).state()


@replays("fedmd", "fedmd_rounds")
def fedmd_rounds(case: Case, subject: Subject) -> None:
    """FedMD's code, in Keras: consensus, digest, revisit over two rounds."""
    (objective, fusion), parties = as_in(case, subject), range(case.hyper["parties"])
    x = case.tensor("in/x_public")
    public = Samples(x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.int64))
    own = [Samples(case.tensor(f"in/x_private_{k}"), case.tensor(f"in/y_private_{k}")) for k in parties]
    nets = [Party.of(case, k) for k in parties]
    states = [begun(case, net, k, objective.settings) for k, net in enumerate(nets)]
    info = FederationInfo(tuple(len(one) for one in own), case.hyper["classes"], tuple(x.shape[2:]), public=x.shape[1])
    server = fusion.start(Weights({}, {}), info)
    for round_ in range(len(x)):
        uploads = []
        for k, net in enumerate(nets):
            task = LocalTask(round_, k, len(own[k]), 0.1, 0.1, 1)
            received = over_the_wire(fusion.broadcast(server, k, info))
            initial = net.weights(case.tensor(f"in/w0_{k}"))
            site = Site(net.model, initial, own[k], task, received, states[k], LocalSettings(), 0, public=public)
            turn = compare_turn(case, objective, site, net)
            states[k] = turn.state
            uploads.append(Upload(k, over_the_wire(turn.payload), len(own[k]), turn.steps))
        server = fusion.fuse(server, uploads, RoundContext(round_, info))
        if round_ < len(x) - 1:
            case.agrees("out/consensus", server.method["consensus"]["logits"], round_)


def compare_turn(case: Case, objective: fedmd.FedMDObjective, site: Site, net: Party) -> Turn:
    """Let a participant do its round and compare its model after each lesson, and its logits."""
    round_, k = site.task.round, site.task.client
    before = max(round_ - 1, 0)
    orders = case.tensor("in/digest_perm")[before, k], case.tensor("in/revisit_perm")[before, k, 0]
    recorded = Recorded(*orders, case.array("in/x_public").shape[1])
    with recorded.playing():
        turn = objective.run(site)
    lessons = [name for name, _ in recorded.seen]
    must(lessons == (["digest", "revisit"] if round_ else []), f"round {round_} has the lessons {lessons}")
    for name, weights in recorded.seen:
        case.agrees(f"out/w_after_{name}_r{before}_{k}", net.flat(weights))
    case.agrees("out/party_logits", turn.payload[Kind.LOGITS]["logits"], (round_, k))
    return turn
