"""FedMD: whole rounds of a client and of the server, with the recorded subsets and orders in place of drawn ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from registry import Case, checks
from tiny import over_the_wire
from torch import Tensor

from fedstill.client import Site
from fedstill.config import LocalSettings
from fedstill.data.dataset import Samples
from fedstill.methods import fedmd
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, Upload
from fedstill.models import Stateless, split_state
from fedstill.models.fedmd import fedmd_cnn
from fedstill.weights import State, Weights


@dataclass(frozen=True)
class Party:
    """A participant of the case: its model in float64, and the places of the case's flat state in it."""

    model: Stateless
    names: list[str]

    @staticmethod
    def of(case: Case, number: int) -> Party:
        described = case.meta["architectures"][f"party_{number}"]
        widths = tuple(
            e["shape"][0] for e in described["layout"] if e["name"].startswith("conv") and "weight" in e["name"]
        )
        with torch.random.fork_rng(devices=[]):
            module = fedmd_cnn(tuple(described["input"]), case.hyper["classes"], widths=widths, dropout=0.0).double()
        names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
        shapes = [list(module.state_dict()[name].shape) for name in names]
        assert shapes == [entry["shape"] for entry in described["layout"]]
        return Party(Stateless(module, "head"), names)

    def weights(self, flat: Tensor) -> Weights:
        weights = Weights(*split_state(self.model.module))
        sizes = [{**weights.params, **weights.buffers}[name].numel() for name in self.names]
        for name, part in zip(self.names, flat.split(sizes), strict=True):
            group = weights.params if name in weights.params else weights.buffers
            group[name] = part.reshape(group[name].shape).clone()
        return weights

    def flat(self, weights: Weights) -> Tensor:
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
        study = fedmd.Learner.study

        def order(samples: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
            found = self.digest if samples == self.samples else self.revisit
            assert (len(found), -(-samples // size)) == (samples, steps)
            yield from found.split(size)

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


def settings_of(case: Case) -> fedmd.FedMDSettings:
    hyper = case.hyper
    settings = fedmd.FedMDSettings(
        mode="code",
        align_samples=case.array("in/x_public").shape[1],
        digest_epochs=hyper["digest"]["epochs"],
        digest_batch_size=hyper["digest"]["batch"],
        revisit_epochs=hyper["revisit"]["epochs"],
        revisit_batch_size=hyper["revisit"]["batch"],
    )
    adam = settings.optimiser()
    assert adam.keras
    assert (adam.lr, list(adam.betas), adam.epsilon) == tuple(hyper["adam"][key] for key in ("lr", "betas", "eps"))
    return settings


@checks("fedmd_rounds")
def rounds(case: Case) -> None:
    settings, parties = settings_of(case), range(case.hyper["parties"])
    x = case.tensor("in/x_public")
    public = Samples(x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.int64))
    own = [Samples(case.tensor(f"in/x_private_{k}"), case.tensor(f"in/y_private_{k}")) for k in parties]
    nets = [Party.of(case, k) for k in parties]
    states = []
    for k, net in enumerate(nets):  # the case begins after the transfer learning, with fresh Adams
        weights = net.weights(case.tensor(f"in/w0_{k}"))
        fresh = [fedmd.Adam.start(weights.params) for _ in range(2)]
        states.append(fedmd.Learner(net.model, weights, settings, *fresh).state())
    info = FederationInfo(tuple(len(one) for one in own), case.hyper["classes"], tuple(x.shape[2:]), public=x.shape[1])
    objective, fusion = fedmd.FedMDObjective(settings), fedmd.FedMDFusion(settings, len(nets))
    server = fusion.start(Weights({}, {}), info)
    for round_ in range(len(x)):
        uploads = []
        for k, net in enumerate(nets):
            before = max(round_ - 1, 0)
            recorded = Recorded(
                case.tensor("in/digest_perm")[before, k], case.tensor("in/revisit_perm")[before, k, 0], x.shape[1]
            )
            task = LocalTask(round_, k, len(own[k]), 0.1, 0.1, 1)
            received = over_the_wire(fusion.broadcast(server, k, info))
            initial = net.weights(case.tensor(f"in/w0_{k}"))
            site = Site(net.model, initial, own[k], task, received, states[k], LocalSettings(), 0, public=public)
            with recorded.playing():
                turn = objective.run(site)
            states[k] = turn.state
            assert [name for name, _ in recorded.seen] == (["digest", "revisit"] if round_ else [])
            for name, weights in recorded.seen:
                case.agrees(f"out/w_after_{name}_r{before}_{k}", net.flat(weights))
            sent = over_the_wire(turn.payload)
            case.agrees("out/party_logits", sent[fedmd.Kind.LOGITS]["logits"], (round_, k))
            uploads.append(Upload(k, sent, len(own[k]), turn.steps))
        server = fusion.fuse(server, uploads, RoundContext(round_, info))
        if round_ < len(x) - 1:
            case.agrees("out/consensus", server.method["consensus"]["logits"], round_)
