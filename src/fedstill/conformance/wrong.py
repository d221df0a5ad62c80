"""Deliberately wrong methods, each with the check that must catch it: the suite's own proof.

A function here makes a method with one mistake from a configuration; its docstring says what the mistake is. Many of
them have been made in public implementations.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.client import Site
from fedstill.config import Config
from fedstill.distill.teachers import Teachers
from fedstill.methods.alone import AloneFusion, AloneObjective
from fedstill.methods.base import (
    FederationInfo,
    LocalTask,
    Refined,
    RoundContext,
    ServerState,
    Turn,
    Upload,
)
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.feddf import FedDF
from fedstill.methods.feddistill import FedDistillFusion, FedDistillObjective
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective
from fedstill.methods.fedftg import FedFTG
from fedstill.methods.fedgen import FedGenFusion, FedGenObjective, imitate
from fedstill.methods.fedmd import FedMDFusion, FedMDObjective
from fedstill.methods.fedprox import FedProxObjective
from fedstill.methods.moon import MoonObjective
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights


@dataclass(frozen=True)
class Wrong:
    """A wrong method: its mistake, the family it claims to be of, and the checks that must catch it."""

    name: str
    mistake: str
    like: str
    caught_by: tuple[str, ...]
    make: Callable[[Config], Any]


WRONG: dict[str, Wrong] = {}


def wrong(like: str, *caught_by: str) -> Callable[[Callable[[Config], Any]], Callable[[Config], Any]]:
    """Enter a wrong method in the table."""

    def enter(make: Callable[[Config], Any]) -> Callable[[Config], Any]:
        name = make.__name__.replace("_", "-")
        WRONG[name] = Wrong(name, " ".join((inspect.getdoc(make) or "").split()), like, caught_by, make)
        return make

    return enter


# SCAFFOLD


def scaffold(config: Config, objective: type[ScaffoldObjective], fusion: type[ScaffoldFusion] = ScaffoldFusion) -> Any:
    """Return SCAFFOLD with a half exchanged."""
    return objective(config.scaffold), fusion(config.scaffold, config.fusion, refined=False)


@wrong("scaffold", "scaffold-reaches-the-pooled-optimum", "scaffold-rounds-by-hand", "agrees-with-reference-cases")
def scaffold_wrong_sign(config: Config) -> Any:
    """SCAFFOLD whose correction is ``c_k - c`` instead of ``c - c_k``."""

    class Objective(ScaffoldObjective):
        def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
            return [grad - extras["correction"][name] for grad, name in zip(grads, params)]

    return scaffold(config, Objective)


@wrong("scaffold", "scaffold-c-is-the-mean-of-the-variates", "scaffold-rounds-by-hand", "agrees-with-reference-cases")
def scaffold_sum_of_changes(config: Config) -> Any:
    """SCAFFOLD whose server adds the clients' changes to c without the factor 1/K."""

    class Fusion(ScaffoldFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, old = super().fuse(server, uploads, context), server.method["control"]
            control = {k: old[k] + context.info.size * (v - old[k]) for k, v in done.method["control"].items()}
            return ServerState(done.weights, {"control": control})

    return scaffold(config, ScaffoldObjective, Fusion)


@wrong("scaffold", "scaffold-c-is-the-mean-of-the-variates", "scaffold-rounds-by-hand")
def scaffold_mean_over_the_cohort(config: Config) -> Any:
    """SCAFFOLD whose server divides the clients' changes by the cohort's size instead of by K."""

    class Fusion(ScaffoldFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, old = super().fuse(server, uploads, context), server.method["control"]
            factor = context.info.size / len(uploads)
            control = {k: old[k] + factor * (v - old[k]) for k, v in done.method["control"].items()}
            return ServerState(done.weights, {"control": control})

    return scaffold(config, ScaffoldObjective, Fusion)


@wrong("scaffold", "scaffold-current-rate", "rate-of-the-round")
def scaffold_undecayed_rate(config: Config) -> Any:
    """SCAFFOLD whose c_k divides by the learning rate of round 0, as the released code of FedDyn and FedFTG does."""
    keys = config.scaffold.model_copy(update={"denominator_lr": "initial"})
    return ScaffoldObjective(keys), ScaffoldFusion(keys, config.fusion, refined=False)


@wrong("scaffold", "scaffold-rounds-by-hand")
def scaffold_overwritten_variate(config: Config) -> Any:
    """SCAFFOLD whose client keeps the change of c_k in place of c_k."""

    class Objective(ScaffoldObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, _ = super().finish(received, state, trained, task)
            return payload, {"control": payload[Kind.CONTROL_VARIATE]}

    return scaffold(config, Objective)


@wrong("scaffold", "scaffold-reaches-the-mean-optimum")
def scaffold_always_by_samples(config: Config) -> Any:
    """SCAFFOLD whose omega_k is n_k K / sum n even where all clients should count the same."""
    keys = config.scaffold.model_copy(update={"client_weights": "samples"})
    return ScaffoldObjective(keys), ScaffoldFusion(keys, config.fusion, refined=False)


@wrong("scaffold", "scaffold-first-round-is-fedavg")
def scaffold_random_start(config: Config) -> Any:
    """SCAFFOLD whose c does not start at zero."""

    class Fusion(ScaffoldFusion):
        def start(self, weights: Weights, info: FederationInfo) -> ServerState:
            control = {name: 0.01 * torch.ones_like(value) for name, value in weights.params.items()}
            return ServerState(weights, {"control": control})

    return scaffold(config, ScaffoldObjective, Fusion)


@wrong("scaffold", "state-outlives-absence")
def scaffold_forgets_absentees(config: Config) -> Any:
    """SCAFFOLD whose client starts again at c_k = 0 when it was away in the round before."""

    def fresh(state: State, task: LocalTask) -> State:
        return state if state and int(state["seen"]["round"]) == task.round - 1 else {}

    class Objective(ScaffoldObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return super().prepare(received, fresh(state, task), task)

        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, fresh(state, task), trained, task)
            return payload, {**kept, "seen": {"round": torch.tensor(task.round)}}

    return scaffold(config, Objective)


@wrong("scaffold", "state-is-the-clients-own")
def scaffold_one_variate_for_all(config: Config) -> Any:
    """SCAFFOLD whose c_k is kept on the object, so that each client goes on with the last one's."""
    last: State = {}

    class Objective(ScaffoldObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return super().prepare(received, last, task)

        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, dict(last), trained, task)
            last.update(kept)
            return payload, kept

    return scaffold(config, Objective)


@wrong("scaffold", "uploads-are-as-declared")
def scaffold_double_precision_variates(config: Config) -> Any:
    """SCAFFOLD that uploads its variates in float64 whatever the model's type."""

    class Objective(ScaffoldObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, state, trained, task)
            doubled = {name: value.double() for name, value in payload[Kind.CONTROL_VARIATE].items()}
            return payload.also(Kind.CONTROL_VARIATE, doubled), kept

    return scaffold(config, Objective)


@wrong("scaffold", "survives-a-checkpoint")
def scaffold_variate_on_the_object(config: Config) -> Any:
    """SCAFFOLD whose server keeps c on the object, and not in the state that a checkpoint holds."""
    memory: State = {}

    class Fusion(ScaffoldFusion):
        def start(self, weights: Weights, info: FederationInfo) -> ServerState:
            server = super().start(weights, info)
            memory.update(server.method)
            return ServerState(server.weights)

        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            return super().broadcast(replace(server, method=dict(memory)), client, info)

        def upload_like(self, server: ServerState) -> Payload:
            return super().upload_like(replace(server, method=dict(memory)))

        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(replace(server, method=dict(memory)), uploads, context)
            memory.update(done.method)
            return ServerState(done.weights)

    return scaffold(config, ScaffoldObjective, Fusion)


# FedDyn


@wrong(
    "feddyn",
    "feddyn-cloud-is-the-mean-plus-h",
    "feddyn-rounds-by-hand",
    "feddyn-first-round-overshoots",
    "agrees-with-reference-cases",
)
def feddyn_misplaced_parenthesis(config: Config) -> Any:
    """FedDyn whose h takes w_t off once: ``(1/K) (sum_S w_k - w_t)`` instead of ``(1/K) sum_S (w_k - w_t)``."""

    class Fusion(FedDynFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, missing = super().fuse(server, uploads, context), (len(uploads) - 1) / context.info.size
            sent = server.weights.params
            h = {name: value + missing * sent[name] for name, value in done.method["h"].items()}
            cloud = {name: value + missing * sent[name] for name, value in done.weights.params.items()}
            return ServerState(Weights(cloud, done.weights.buffers), {"h": h})

    return FedDynObjective(), Fusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-first-round-overshoots", "feddyn-cloud-is-the-mean-plus-h")
def feddyn_mean_over_the_cohort(config: Config) -> Any:
    """FedDyn whose h divides by the cohort's size instead of by K."""

    class Fusion(FedDynFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            few = replace(context.info, clients=tuple(upload.client for upload in uploads))
            return super().fuse(server, uploads, replace(context, info=few))

    return FedDynObjective(), Fusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-rounds-by-hand")
def feddyn_without_the_quadratic_term(config: Config) -> Any:
    """FedDyn without ``alpha/2 ||w||^2``."""

    class Objective(FedDynObjective):
        def extra_weight_decay(self, received: Payload, task: LocalTask) -> float:
            return 0.0

    return Objective(), FedDynFusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-reaches-the-pooled-optimum")
def feddyn_equal_alphas(config: Config) -> Any:
    """FedDyn with the same alpha for clients of any size, where the optimum of the pooled data is asked for."""
    return FedDynObjective(), FedDynFusion(config.feddyn.model_copy(update={"client_weights": "uniform"}))


# FedAvg and what is general


class InPlace(FedAvgFusion):
    """Adds up in the first upload's memory."""

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return the right average, at the cost of an upload."""
        done = super().fuse(server, uploads, context)
        for name, value in uploads[0].weights.params.items():
            value.copy_(done.weights.params[name])
        return done


@wrong("fedavg", "inputs-not-changed")
def fedavg_in_place(config: Config) -> Any:
    """FedAvg that adds up in the memory of the first upload."""
    return FedAvgObjective(), InPlace(config.fusion)


@wrong("fedavg", "fedavg-rounds-by-hand", "agrees-with-reference-cases")
def fedavg_uniform(config: Config) -> Any:
    """FedAvg that averages uniformly instead of by n_k."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            return super().fuse(server, [replace(upload, samples=1) for upload in uploads], context)

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "order-of-uploads", "fedavg-rounds-by-hand")
def fedavg_weights_by_place(config: Config) -> Any:
    """FedAvg that weighs the i-th upload with the size of client i, whoever sent it."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            sizes = context.info.samples
            moved = [replace(upload, samples=sizes[place]) for place, upload in enumerate(uploads)]
            return super().fuse(server, moved, context)

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "fedavg-drifts")
def fedavg_one_step(config: Config) -> Any:
    """FedAvg whose clients take one step, whatever they are told: distributed SGD."""

    class Objective(FedAvgObjective):
        def run(self, site: Site) -> Turn:
            return super().run(replace(site, task=replace(site.task, steps=1)))

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers")
def fedavg_drops_buffers(config: Config) -> Any:
    """FedAvg that averages parameters and leaves BatchNorm's statistics as they were at first."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            return replace(done, weights=Weights(done.weights.params, server.weights.buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers", "agrees-with-reference-cases")
def fedavg_last_clients_buffers(config: Config) -> Any:
    """FedAvg that takes BatchNorm's statistics from the last client."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            return replace(done, weights=Weights(done.weights.params, uploads[-1].weights.buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers")
def fedavg_float_counter(config: Config) -> Any:
    """FedAvg that makes a float of BatchNorm's batch counter."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            buffers = {name: value.double() for name, value in done.weights.buffers.items()}
            return replace(done, weights=Weights(done.weights.params, buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "global-stream-untouched")
def fedavg_global_noise(config: Config) -> Any:
    """FedAvg that adds noise to its batches from PyTorch's global stream."""

    class Objective(FedAvgObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            return super().loss(model, params, buffers, x + 0.01 * torch.randn_like(x), y, extras)

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "same-bits-twice")
def fedavg_own_noise(config: Config) -> Any:
    """FedAvg with noise from a generator of its own that goes on from client to client."""
    stream = random.Random(0)

    class Objective(FedAvgObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return {"noise": {"size": torch.tensor(stream.random())}}

        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            return super().loss(model, params, buffers, x * (1 + 0.01 * extras["noise"]["size"]), y, extras)

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "steps-batch-over-clients")
def fedavg_looks_at_values(config: Config) -> Any:
    """FedAvg whose loss decides by the value of a tensor, which cannot be batched."""

    class Objective(FedAvgObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            loss = super().loss(model, params, buffers, x, y, extras)
            return loss if loss.item() < 100 else loss * 0

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "survives-a-checkpoint")
def fedavg_counts_in_python(config: Config) -> Any:
    """FedAvg whose clients keep the number of their rounds as a Python number."""

    class Objective(FedAvgObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, _ = super().finish(received, {}, trained, task)
            kept: Any = {"rounds": {"done": state["rounds"]["done"] + 1 if state else 1}}
            return payload, kept

    return Objective(), FedAvgFusion(config.fusion)


# FedProx


@wrong("fedprox", "fedprox-pulls-to-what-was-sent", "fedprox-rounds-by-hand")
def fedprox_to_zero(config: Config) -> Any:
    """FedProx that pulls to zero instead of to w_t: weight decay."""

    class Objective(FedProxObjective):
        def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
            return [grad + self.settings.mu * value for grad, value in zip(grads, params.values())]

    return Objective(config.fedprox), FedAvgFusion(config.fusion)


@wrong("fedprox", "fedprox-rounds-by-hand")
def fedprox_twice_mu(config: Config) -> Any:
    """FedProx that forgets the 1/2 of ``mu/2 ||w - w_t||^2``."""
    return FedProxObjective(config.fedprox.model_copy(update={"mu": 2 * config.fedprox.mu})), FedAvgFusion(
        config.fusion
    )


@wrong("fedprox", "fedprox-without-mu-is-fedavg")
def fedprox_mu_or_default(config: Config) -> Any:
    """FedProx that takes mu = 0 for a mu that was not given."""
    keys = config.fedprox.model_copy(update={"mu": config.fedprox.mu or 1e-4})
    return FedProxObjective(keys), FedAvgFusion(config.fusion)


@wrong("fedprox", "traffic-as-in-the-papers")
def fedprox_sends_the_anchor(config: Config) -> Any:
    """FedProx that sends w_t a second time, as the anchor."""

    class Fusion(FedAvgFusion):
        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            return super().broadcast(server, client, info).also(Kind.REFERENCE, server.weights.params)

    return FedProxObjective(config.fedprox), Fusion(config.fusion)


@wrong("fedprox", "survives-the-wire")
def fedprox_lossy_mu(config: Config) -> Any:
    """FedProx whose server sends mu as a Python number."""

    class Fusion(FedAvgFusion):
        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            number: Any = {"mu": config.fedprox.mu}
            return super().broadcast(server, client, info).also(Kind.SCALARS, number)

    return FedProxObjective(config.fedprox), Fusion(config.fusion)


@wrong("alone", "alone-by-hand")
def alone_starts_anew(config: Config) -> Any:
    """Training alone that starts from the initial weights in every round."""

    class Objective(AloneObjective):
        def run(self, site: Site) -> Turn:
            return super().run(replace(site, state={}))

    return Objective(), AloneFusion()


# MOON


@wrong("moon", "moon-steps-by-hand", "agrees-with-reference-cases")
def moon_wrong_positive(config: Config) -> Any:
    """MOON that pulls to the client's old model and pushes the global one away."""

    class Objective(MoonObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            right = super().prepare(received, state, task)
            return {group: {name: value.flip(0) for name, value in own.items()} for group, own in right.items()}

    return Objective(config.moon), FedAvgFusion(config.fusion)


@wrong("moon", "moon-steps-by-hand")
def moon_without_temperature(config: Config) -> Any:
    """MOON whose cosines are not divided by tau."""
    return MoonObjective(config.moon.model_copy(update={"tau": 1.0})), FedAvgFusion(config.fusion)


@wrong("moon", "moon-without-mu-is-fedavg")
def moon_mu_or_default(config: Config) -> Any:
    """MOON that takes mu = 0 for a mu that was not given."""
    return MoonObjective(config.moon.model_copy(update={"mu": config.moon.mu or 1.0})), FedAvgFusion(config.fusion)


@wrong("moon", "moon-first-participation-is-fedavg")
def moon_negative_from_nowhere(config: Config) -> Any:
    """MOON that compares with a model of noise at the first participation, where there is no old one."""

    class Objective(MoonObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            sent = received.weights()
            noise = {name: torch.linspace(-1, 1, value.numel()).to(value).view(1, *value.shape)
                     for name, value in sent.params.items()}  # fmt: skip
            buffers = {name: value[None] for name, value in sent.buffers.items()}
            return super().prepare(received, state or {"previous": noise, "previous-buffers": buffers}, task)

    return Objective(config.moon), FedAvgFusion(config.fusion)


# FedGen


def fedgen(config: Config, **keys: Any) -> Any:
    """Return FedGen with keys exchanged."""
    own = config.fedgen.model_copy(update=keys)
    return FedGenObjective(own, config.local.batch_size), FedGenFusion(own, config.fusion)


@wrong("fedgen", "fedgen-label-weights-act-per-sample")
def fedgen_lost_weights(config: Config) -> Any:
    """FedGen whose label weights are lost by broadcasting, as in the authors' code: a product of two means."""
    return fedgen(config, teacher="product-of-means")


@wrong("fedgen", "fedgen-teacher-is-the-mean-of-the-logits")
def fedgen_sum_of_losses(config: Config) -> Any:
    """FedGen whose generator follows the sum of the heads' losses in place of their ensemble's."""
    return fedgen(config, teacher="per-sample")


@wrong("fedgen", "fedgen-generated-batch-reaches-the-head-alone")
def fedgen_trains_the_body(config: Config) -> Any:
    """FedGen that also pulls the model's own features to the generated ones."""

    class Objective(FedGenObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            loss, draws = super().loss(model, params, buffers, x, y, extras), extras.get("draws")
            if draws is None:
                return loss
            _, z = model.with_features(params, {name: value.clone() for name, value in buffers.items()}, x, train=True)
            made = imitate(extras["generator"], draws["noise"], draws["labels"])
            return loss + draws["alpha"] * F.mse_loss(z.mean(0), made.mean(0))

    return Objective(config.fedgen, config.local.batch_size), FedGenFusion(config.fedgen, config.fusion)


@wrong("fedgen", "fedgen-client-steps-by-hand")
def fedgen_other_labels(config: Config) -> Any:
    """FedGen whose generated features are learnt under labels that they were not generated for."""

    class Objective(FedGenObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            if "draws" not in extras:
                return super().loss(model, params, buffers, x, y, extras)
            draws = extras["draws"]
            made = imitate(extras["generator"], draws["noise"], draws["labels"])
            answer = F.cross_entropy(model.head(params, made), draws["labels"].roll(1))
            return F.cross_entropy(model(params, buffers, x, train=True), y) + draws["alpha"] * answer

    return Objective(config.fedgen, config.local.batch_size), FedGenFusion(config.fedgen, config.fusion)


@wrong("fedgen", "fedgen-first-round-is-plain")
def fedgen_untrained_generator(config: Config) -> Any:
    """FedGen that regularises from the first round on, with a generator that has learnt nothing."""

    class Objective(FedGenObjective):
        def draws(self, received: Payload, task: LocalTask, stream: torch.Generator) -> Tensors:
            return super().draws(received, replace(task, round=max(1, task.round)), stream)

    return Objective(config.fedgen, config.local.batch_size), FedGenFusion(config.fedgen, config.fusion)


@wrong("fedgen", "fedgen-labels-are-those-counted")
def fedgen_uniform_labels(config: Config) -> Any:
    """FedGen that never learns which labels there are, and generates all alike."""
    return fedgen(config, labels="uniform")


# FedDistill, FedMD


@wrong("feddistill", "feddistill-rounds-by-hand")
def feddistill_forgets(config: Config) -> Any:
    """FedDistill that counts anew in every round."""

    class Objective(FedDistillObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            return super().finish(received, {}, trained, task)

    return Objective(config.feddistill), FedDistillFusion(config.feddistill, config.fusion)


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


# Refinements


@dataclass(frozen=True)
class Everybody:
    """The cohort's teachers, and one that stands for all absent clients and agrees with the student."""

    cohort: Teachers
    counts: Tensor
    model: Stateless
    student: Weights

    def __len__(self) -> int:
        return len(self.counts)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes)."""
        return torch.cat([self.cohort.logits(x), self.logits_of(len(self) - 1, x)[None]])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        if teacher < len(self.cohort):
            return self.cohort.logits_of(teacher, x)
        return self.model(self.student.params, self.student.buffers, x, train=False)

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cohort's."""
        return self.cohort.statistics_gap(x)


def ftg(config: Config, **keys: Any) -> FedFTG:
    """Return FedFTG with keys exchanged."""
    return FedFTG(config.fedftg.model_copy(update=keys))


@wrong("fedftg", "fedftg-shares-over-the-cohort", "fedftg-student-step-by-hand")
def fedftg_shares_over_all(config: Config) -> Any:
    """FedFTG whose alpha is each client's share of all clients' samples instead of the cohort's."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            held = teachers.counts.sum()
            absent = teachers.counts.sum(0) * (sum(context.info.samples) - held) // held
            everybody = Everybody(teachers, torch.cat([teachers.counts, absent[None]]), model, student.clone())
            return super().refine(model, student, everybody, state, context)

    return Refinement(config.fedftg)


@wrong("fedftg", "fedftg-student-step-by-hand")
def fedftg_teacher_first(config: Config) -> Any:
    """FedFTG whose student lowers KL(teachers || student), as in the released code."""
    return ftg(config, md_student="kl-teacher-student")


@wrong("fedftg", "fedftg-shares-sum-to-one")
def fedftg_shares_with_a_large_epsilon(config: Config) -> Any:
    """FedFTG that guards its denominators with 1, which counts among small numbers of samples."""
    return ftg(config, share_epsilon=1.0)


@wrong("fedftg", "fedftg-labels-follow-the-cohort", "refinement-agrees-with-reference-cases")
def fedftg_uniform_labels(config: Config) -> Any:
    """FedFTG that generates all classes alike, held or not."""
    return ftg(config, labels="uniform")


@wrong("fedftg", "fedftg-class-weights-per-sample")
def fedftg_weights_as_a_mean(config: Config) -> Any:
    """FedFTG whose L_cls is a product of two means, as in the released code."""
    return ftg(config, cls_weights="batch-mean")


@wrong("fedftg", "fedftg-generator-loss-by-hand", "refinement-agrees-with-reference-cases")
def fedftg_generator_helps(config: Config) -> Any:
    """FedFTG whose generator lowers L_md instead of raising it."""
    return ftg(config, lambda_md=-config.fedftg.lambda_md)


@wrong("fedftg", "fedftg-student-rests-in-the-generator-phase")
def fedftg_student_moves_along(config: Config) -> Any:
    """FedFTG whose student takes a step of its own, at a rate of its own, before the student phase."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            along = replace(student, params={name: 0.999 * value for name, value in student.params.items()})
            return super().refine(model, along, teachers, state, context)

    return Refinement(config.fedftg)


@wrong("fedftg", "fedftg-generator-rests-in-the-student-phase")
def fedftg_generator_moves_along(config: Config) -> Any:
    """FedFTG whose generator takes a step with every step of the student."""
    return ftg(config, generator_steps=config.fedftg.student_steps)


@wrong("fedftg", "fedftg-without-iterations-is-its-base")
def fedftg_at_least_once(config: Config) -> Any:
    """FedFTG that does one iteration where none is asked for."""
    return ftg(config, iterations=max(1, config.fedftg.iterations))


@wrong("fedftg", "refinement-leaves-its-inputs")
def fedftg_in_place(config: Config) -> Any:
    """FedFTG that writes the refined weights into the fused model's tensors."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, state, context)
            for name, value in student.params.items():
                value.copy_(done.weights.params[name])
            return done

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-same-bits-twice")
def fedftg_global_noise(config: Config) -> Any:
    """FedFTG whose streams are seeded from PyTorch's global one."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            seed = int(torch.randint(1000, ()))
            fresh = replace(context, stream=lambda purpose: torch.Generator().manual_seed(seed))
            return super().refine(model, student, teachers, state, fresh)

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-survives-a-checkpoint")
def fedftg_generator_on_the_object(config: Config) -> Any:
    """FedFTG whose generator lives on in the object, and not in the state that a checkpoint holds."""
    memory: State = {}

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, memory, context)
            memory.update(done.state)
            return replace(done, state={})

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-returns-the-models-shape")
def fedftg_single_precision(config: Config) -> Any:
    """FedFTG that returns its student in float32 whatever the model's type."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, state, context)
            return replace(done, weights=done.weights.map(lambda value: value.float()))

    return Refinement(config.fedftg)


@wrong("feddf", "feddf-average-of-logits", "refinement-agrees-with-reference-cases")
def feddf_average_of_probabilities(config: Config) -> Any:
    """FedDF that averages the teachers' probabilities instead of their logits."""
    return FedDF(config.feddf.model_copy(update={"average": "probabilities"}))


@wrong("feddf", "feddf-without-steps-is-its-base")
def feddf_at_least_once(config: Config) -> Any:
    """FedDF that takes one step where none is asked for."""
    return FedDF(config.feddf.model_copy(update={"steps": max(1, config.feddf.steps)}))
