"""FedMD with a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedstill.client import Site
from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    RoundContext,
    ServerState,
    Turn,
    Upload,
)
from fedstill.methods.fedmd import FedMDFusion, FedMDObjective
from fedstill.payload import Kind, Payload


@wrong("fedmd", "fedmd-consensus-is-digested-in-the-next-turn")
def fedmd_stale_consensus(config: Config) -> Any:
    """FedMD whose participants digest before the server aggregates: each consensus is sent a round too late."""

    class Fusion(FedMDFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            new = super().fuse(server, uploads, context).method["consensus"]
            late = {"consensus": server.method["waiting"]} if "waiting" in server.method else {}
            return ServerState(server.weights, {**server.method, **late, "waiting": new})

    return FedMDObjective(config.fedmd), Fusion(config.fedmd, config.data.clients)


@wrong("fedmd", "fedmd-rounds-by-hand")
def fedmd_digests_itself(config: Config) -> Any:
    """FedMD whose participant digests its own logits instead of the consensus."""

    class Objective(FedMDObjective):
        def run(self, site: Site) -> Turn:
            if Kind.LOGITS not in site.received or site.public is None:
                return super().run(site)
            own = self.own_model(site.received, site.state, site.initial)
            with torch.no_grad():
                logits = site.model(own.params, own.buffers, site.public.x, train=False)
            return super().run(replace(site, received=Payload({Kind.LOGITS: {"logits": logits}})))

    return Objective(config.fedmd), FedMDFusion(config.fedmd, config.data.clients)


@wrong("fedmd", "fedmd-only-logits-travel")
def fedmd_sends_its_model(config: Config) -> Any:
    """FedMD whose participants send their models along."""

    class Objective(FedMDObjective):
        def run(self, site: Site) -> Turn:
            turn = super().run(site)
            return replace(turn, payload=turn.payload.also(Kind.WEIGHTS, turn.state["params"]))

    return Objective(config.fedmd), FedMDFusion(config.fedmd, config.data.clients)
