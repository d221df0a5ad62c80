"""FedGen's released code: a client's steps, the generator's steps over two rounds, the average, the diversity loss."""

from __future__ import annotations

from collections import OrderedDict

import torch
from registry import Case, checks
from tiny import Architecture, batch_order
from torch import Tensor, nn

from fedstill.adam import Adam
from fedstill.client import ClientWork, LocalTrainer
from fedstill.config import LocalSettings
from fedstill.data.dataset import Samples
from fedstill.distill.losses import diversity
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, ServerState, Upload
from fedstill.methods.fedgen import FedGenFusion, FedGenObjective, FedGenSettings, Predictors, imitate
from fedstill.models import Stateless
from fedstill.payload import Kind, Payload, model_payload
from fedstill.training import SGD, train_locally
from fedstill.weights import State, Tensors, Weights

HEAD = "layers.5"
GENERATOR = (
    "hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "",
    "latent.weight", "latent.bias",
)  # fmt: skip
"""Our names in the order of the recorded generator; it has BatchNorm's batch counter too."""


class FedGenNet(nn.Module):
    """conv3x3 stride 2 - BN - ReLU - linear - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6),
            nn.Linear(6, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def network(case: Case) -> Architecture:
    module, layout = FedGenNet().double(), case.meta["architectures"]["model"]["layout"]
    own = module.state_dict()
    assert [(name, list(value.shape)) for name, value in own.items()] == [(e["name"], e["shape"]) for e in layout]
    return Architecture(module, {entry["name"]: entry["kind"] for entry in layout})


def generator(case: Case) -> OrderedDict[str, Tensor]:
    """Return the recorded generator under our names."""
    layout, flat = case.meta["architectures"]["generator"]["layout"], case.tensor("in/generator")
    parts = torch.split(flat, [entry["size"] for entry in layout])
    named = zip(GENERATOR, parts, layout, strict=True)
    return OrderedDict((name, part.reshape(entry["shape"]).clone()) for name, part, entry in named if name)


def flat_generator(method: State, like: Tensor) -> Tensor:
    """Return a generator as recorded; the batch counter, which fedstill does not have, is copied from ``like``."""
    found = {**method["generator"], **method["statistics"]}
    parts = [found[name].reshape(-1) if name else like[180:181] for name in GENERATOR]
    return torch.cat([part.double() for part in parts])


@checks("fedgen_user", "fedgen_user_round0")
def user(case: Case) -> None:
    hyper, net, first = case.hyper, network(case), case.tensor("in/w0")
    # fedstill generates as many features as the batch has samples, so that it has no ratio of the two.
    settings = FedGenSettings(
        mode="code",
        alpha=hyper["generative_alpha"] * hyper["gen_ratio"],
        beta=hyper["generative_beta"],
        early_stop=hyper["early_stop"],
        noise_dim=5,
    )
    assert settings.coefficient_decay == hyper["coef_decay"]
    objective, model = FedGenObjective(settings, hyper["batch"]), Stateless(net.module, HEAD)
    received = Payload({Kind.WEIGHTS: net.weights(first).params, Kind.GENERATOR: dict(generator(case))})
    received = received.also(Kind.LABEL_COUNTS, {"prior": torch.ones(5, dtype=torch.int32)})
    x, y, order = case.tensor("in/x"), case.tensor("in/y"), batch_order(case.tensor("in/batch_idx"))
    task = LocalTask(hyper["glob_iter"], 0, len(y), hyper["lr"], hyper["lr"], len(order))
    extras = objective.prepare(received, {}, task)
    draws = recorded(case, objective.draws(received, task, torch.Generator()))
    start = objective.own_model(received, {}, net.weights(first))
    for steps in range(1, len(order) + 1):
        done = train_locally(model, objective, start, extras, x, y, order[:steps], SGD(hyper["lr"]), draws=draws)
        case.agrees("out/w_after_step", net.flat(done.weights), steps - 1)
        case.agrees("out/loss", done.losses[-1], steps - 1)
        given = {**extras, "draws": {name: value[steps - 1] for name, value in draws.items()}} if draws else extras
        before = net.weights(first if steps == 1 else case.tensor("out/w_after_step")[steps - 2])
        compare_terms(case, objective, model, before, given, (x[order[steps - 1]], y[order[steps - 1]]), steps - 1)
    payload, state = objective.finish(received, {}, done, task)
    case.agrees("out/label_counts", payload[Kind.LABEL_COUNTS]["seen"])
    assert Kind.BUFFERS not in payload
    assert all(torch.equal(state["buffers"][name], value) for name, value in done.weights.buffers.items())
    # The learning rate that the released client leaves for its next round is fedstill's of this round.
    local = LocalSettings(lr=hyper["lr"], lr_decay=0.99)
    trainer = LocalTrainer(objective, Samples(x, y), [torch.arange(len(y))], local, 5, 0)
    case.agrees("out/lr_after", trainer.task(ClientWork(hyper["glob_iter"], 0, received, {})).lr)


def recorded(case: Case, own: Tensors) -> Tensors:
    """Return the recorded labels and noise with our alpha and beta; nothing was recorded after the early stop."""
    if not own:
        assert case.hyper["glob_iter"] == 0
        return own
    names = {"labels": "in/sampled_y", "noise": "in/eps_sampled", "batch_noise": "in/eps_real_labels"}
    found = {ours: case.tensor(theirs) for ours, theirs in names.items()}
    missing = case.hyper["steps"] - case.hyper["early_stop"]
    return {**own, **{name: torch.cat([value, value[:missing]]) for name, value in found.items()}}


def compare_terms(
    case: Case,
    objective: FedGenObjective,
    model: Stateless,
    before: Weights,
    given: State,
    batch: tuple[Tensor, Tensor],
    step: int,
) -> None:
    """Take the loss of a step apart by its weights."""

    def loss(**weights: float) -> Tensor:
        chosen = {name: torch.tensor(value) for name, value in weights.items()}
        extras = {**given, "draws": {**given["draws"], **chosen}} if "draws" in given else given
        return objective.loss(model, before.params, before.clone().buffers, *batch, extras)

    nll = loss(alpha=0.0, beta=0.0)
    case.agrees("out/nll", nll, step)
    if "draws" in given and step < case.hyper["early_stop"]:
        case.agrees("out/ce_unweighted", loss(alpha=1.0, beta=0.0) - nll, step)
        case.agrees("out/kl_unweighted", loss(alpha=0.0, beta=1.0) - nll, step)


@checks("fedgen_generator")
def generator_steps(case: Case) -> None:
    hyper, net = case.hyper, network(case)
    settings = FedGenSettings(mode="code", lambda_div=hyper["ensemble_eta"], noise_dim=5)
    assert (settings.generator_lr, settings.generator_lr_decay) == (hyper["lr"], hyper["lr_decay_per_round"])
    assert settings.generator_weight_decay == hyper["weight_decay"]
    counts = case.tensor("in/label_counts")
    models = [net.weights(row) for row in case.tensor("in/users")]
    uploads = [Upload(client, model_payload(model), 1, 1) for client, model in enumerate(models)]
    heads = Predictors.of(uploads, counts, HEAD)
    case.agrees("out/label_weights", heads.shares.T)
    case.agrees("out/qualified_labels", torch.nonzero((counts - 1).sum(0)).flatten())

    given = generator(case)
    params = {name: value for name, value in given.items() if "running" not in name}
    statistics = {name: value for name, value in given.items() if "running" in name}
    method: State = {"generator": params, "statistics": statistics, **Adam.start(params)}
    fusion, labels, noise = FedGenFusion(settings), case.tensor("in/y"), case.tensor("in/eps")
    for step, (y, eps) in enumerate(zip(labels, noise, strict=True)):
        seen = {**method["generator"], **{name: value.clone() for name, value in method["statistics"].items()}}
        taught, apart = fusion.terms(heads, imitate(seen, eps, y, train=True), y, eps)
        case.agrees("out/teacher", taught, step)
        case.agrees("out/diversity", apart, step)
        case.agrees("out/loss", taught + settings.lambda_div * apart, step)
        fusion.train_generator(method, heads, y[None], eps[None], step // hyper["steps_per_round"])
        places = {0: "1", 1: "2", 9: "round1", 19: "round2"}
        if step in places:
            key = f"out/generator_after_{places[step]}"
            case.agrees(key, flat_generator(method, case.tensor(key)))
    for round_ in range(2):
        case.agrees("out/lr_per_round", settings.generator_lr * settings.generator_lr_decay**round_, round_)


@checks("fedgen_aggregate")
def aggregate(case: Case) -> None:
    net, sizes = network(case), case.array("in/train_samples").tolist()
    info = FederationInfo(tuple(sizes), 5, (1, 8, 8), HEAD)
    fusion = FedGenFusion(FedGenSettings(mode="code", generator_steps=1))
    server: ServerState = fusion.start(net.weights(case.tensor("in/server")), info)
    seen = {"seen": torch.full((5,), 2, dtype=torch.int32)}
    uploads = []
    for client, row in enumerate(case.tensor("in/users")):
        sent = Payload({Kind.WEIGHTS: net.weights(row).params}).also(Kind.LABEL_COUNTS, seen)
        uploads.append(Upload(client, sent, sizes[client], 1))
    after = fusion.fuse(server, uploads, RoundContext(0, info))
    case.agrees("out/server_after", net.flat(after.weights))


@checks("fedgen_diversity")
def diversity_loss(case: Case) -> None:
    z = case.tensor("in/z").requires_grad_()
    found = diversity(z, case.tensor("in/eps"))
    case.agrees("out/diversity", found)
    case.agrees("out/grad_z", torch.autograd.grad(found, z)[0])
