"""FedGen's released code: a client's steps, the generator's steps over two rounds, the average, the diversity loss."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fedstill.adam import Adam
from fedstill.client import ClientWork, LocalTrainer
from fedstill.config import LocalSettings
from fedstill.conformance.replays.registry import Case, must, replays
from fedstill.conformance.replays.sites import RecordedSite
from fedstill.conformance.replays.subjects import as_recorded, built_in, inside, plain
from fedstill.conformance.replays.tiny import Architecture, batch_order
from fedstill.conformance.subject import Subject
from fedstill.data.dataset import Samples
from fedstill.distill.losses import diversity
from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, RoundContext, Turn, Upload
from fedstill.methods.fedgen import FedGenFusion, FedGenObjective, Predictors, imitate
from fedstill.models import Stateless
from fedstill.payload import Kind, Payload, model_payload
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
        """Return the logits."""
        logits: Tensor = self.layers(x)
        return logits


def network(case: Case) -> Architecture:
    """Return the model of FedGen's cases."""
    with torch.random.fork_rng(devices=[]):
        module = FedGenNet().double()
    layout = case.meta["architectures"]["model"]["layout"]
    own = [(name, list(value.shape)) for name, value in module.state_dict().items()]
    must(own == [(entry["name"], entry["shape"]) for entry in layout], "the model is laid out otherwise")
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


@replays("fedgen", "fedgen_user")
def user(case: Case, subject: Subject) -> None:
    """A client's steps in the form of the authors' code, with its KL term."""
    hyper = case.hyper
    # fedstill generates as many features as the batch has samples, so that it has no ratio of the two.
    subject = as_recorded(
        subject,
        "code",
        alpha=hyper["generative_alpha"] * hyper["gen_ratio"],
        beta=float(hyper["generative_beta"]),
        coefficient_decay=hyper["coef_decay"],
        early_stop=hyper["early_stop"],
        noise_dim=5,
    )
    names = {"labels": "in/sampled_y", "noise": "in/eps_sampled", "batch_noise": "in/eps_real_labels"}
    missing = hyper["steps"] - hyper["early_stop"]  # nothing was recorded after the early stop
    given = {ours: case.tensor(theirs) for ours, theirs in names.items()}
    given = {name: torch.cat([value, value[:missing]]) for name, value in given.items()}
    compare_client(case, subject, given)


@replays("fedgen", "fedgen_user_round0")
def first_user(case: Case, subject: Subject) -> None:
    """A client's steps in the first round, where nothing is regularised."""
    compare_client(case, subject.where(share="all", noise_dim=5), {})


def compare_client(case: Case, subject: Subject, given: Tensors) -> None:
    """Compare a client's model after each step, what it counts, and what the built-in keeps and minimises."""
    net, objective = network(case), subject.parts()[0]
    client = client_of(case, net, objective, given)
    known = [client.initial, *(net.weights(flat) for flat in case.tensor("out/w_after_step"))]
    for step, before in enumerate(known[:-1]):
        site = client.first(step + 1)
        turn = objective.run(site)
        trained = site.seen.trained
        buffers = turn.payload.parts.get(Kind.BUFFERS, trained.weights.buffers)  # or they stay with the client
        case.agrees("out/w_after_step", net.flat(Weights(turn.payload[Kind.WEIGHTS], buffers)), step)
        if built_in(subject):
            case.agrees("out/loss", trained.losses[-1], step)
            compare_terms(case, inside(objective, FedGenObjective), site, before, step)
    case.agrees("out/label_counts", next(iter(turn.payload[Kind.LABEL_COUNTS].values())))
    if built_in(subject):
        compare_kept(objective, turn, trained.weights)
        compare_rate(case, client)


def client_of(case: Case, net: Architecture, objective: LocalObjective, given: Tensors) -> RecordedSite:
    """Return the client of a case, with draws in place of its own where it makes any."""
    hyper, first = case.hyper, net.weights(case.tensor("in/w0"))
    received = Payload({Kind.WEIGHTS: first.params, Kind.GENERATOR: dict(generator(case))})
    received = received.also(Kind.LABEL_COUNTS, {"prior": torch.ones(5, dtype=torch.int32)})
    if not objective.personal:
        received = received.also(Kind.BUFFERS, first.buffers)
    own, order = Samples(case.tensor("in/x"), case.tensor("in/y")), batch_order(case.tensor("in/batch_idx"))
    task = LocalTask(hyper["glob_iter"], 0, len(own), hyper["lr"], hyper["lr"], len(order))
    local = LocalSettings(lr=hyper["lr"], weight_decay=0.0, clip_norm=None)
    model = Stateless(net.module, HEAD)
    return RecordedSite(model, first, own, task, received, {}, local, 0, batches=order, given=given)


def compare_terms(case: Case, objective: FedGenObjective, site: RecordedSite, before: Weights, step: int) -> None:
    """Take the loss of a step apart by its weights."""
    batch, seen = site.batches[step], site.seen
    x, y = site.own.x[batch], site.own.y[batch]
    draws = {name: value[step] for name, value in seen.draws.items()}

    def loss(**weights: float) -> Tensor:
        chosen = {name: torch.tensor(value) for name, value in weights.items()}
        extras = {**seen.extras, "draws": {**draws, **chosen}} if draws else seen.extras
        return objective.loss(site.model, before.params, before.clone().buffers, x, y, extras)

    nll = loss(alpha=0.0, beta=0.0)
    case.agrees("out/nll", nll, step)
    if draws and step < case.hyper["early_stop"]:
        case.agrees("out/ce_unweighted", loss(alpha=1.0, beta=0.0) - nll, step)
        case.agrees("out/kl_unweighted", loss(alpha=0.0, beta=1.0) - nll, step)


def compare_kept(objective: LocalObjective, turn: Turn, end: Weights) -> None:
    """Make sure that BatchNorm's statistics stay with the client where they are its own."""
    if objective.personal:
        must(Kind.BUFFERS not in turn.payload, "personal statistics were uploaded")
        kept = turn.state["buffers"]
        must(all(torch.equal(kept[name], value) for name, value in end.buffers.items()), "the statistics were not kept")


def compare_rate(case: Case, client: RecordedSite) -> None:
    """Compare the rate that the released client leaves for its next round: fedstill's of this round."""
    task, size = client.task, len(client.own)
    trainer = LocalTrainer(
        LocalObjective(),
        Samples(client.own.x, client.own.y),
        [torch.arange(size)],
        LocalSettings(lr=task.lr, lr_decay=0.99),
        5,
        0,
    )
    case.agrees("out/lr_after", trainer.task(ClientWork(task.round, 0, client.received, {})).lr)


@replays("fedgen", "fedgen_generator")
def generator_steps(case: Case, subject: Subject) -> None:
    """The generator's steps over two rounds, from inside."""
    hyper, net = case.hyper, network(case)
    inside(subject.parts()[1], FedGenFusion)
    subject = as_recorded(
        subject,
        "code",
        lambda_div=float(hyper["ensemble_eta"]),
        noise_dim=5,
        generator_lr=hyper["lr"],
        generator_lr_decay=hyper["lr_decay_per_round"],
        generator_weight_decay=hyper["weight_decay"],
    )
    fusion, counts = inside(subject.parts()[1], FedGenFusion), case.tensor("in/label_counts")
    models = [net.weights(row) for row in case.tensor("in/users")]
    uploads = [Upload(client, model_payload(model), 1, 1) for client, model in enumerate(models)]
    heads = Predictors.of(uploads, counts, HEAD)
    case.agrees("out/label_weights", heads.shares.T)
    case.agrees("out/qualified_labels", torch.nonzero((counts - 1).sum(0)).flatten())
    compare_generator(case, fusion, heads)


def compare_generator(case: Case, fusion: FedGenFusion, heads: Predictors) -> None:
    """Compare the losses of every step, the generator after some, and the rates of the rounds."""
    keys, given = fusion.settings, generator(case)
    params = {name: value for name, value in given.items() if "running" not in name}
    statistics = {name: value for name, value in given.items() if "running" in name}
    method: State = {"generator": params, "statistics": statistics, **Adam.start(params)}
    for step, (y, eps) in enumerate(zip(case.tensor("in/y"), case.tensor("in/eps"), strict=True)):
        seen = {**method["generator"], **{name: value.clone() for name, value in method["statistics"].items()}}
        taught, apart = fusion.terms(heads, imitate(seen, eps, y, train=True), y, eps)
        case.agrees("out/teacher", taught, step)
        case.agrees("out/diversity", apart, step)
        case.agrees("out/loss", taught + keys.lambda_div * apart, step)
        fusion.train_generator(method, heads, y[None], eps[None], step // case.hyper["steps_per_round"])
        places = {0: "1", 1: "2", 9: "round1", 19: "round2"}
        if step in places:
            key = f"out/generator_after_{places[step]}"
            case.agrees(key, flat_generator(method, case.tensor(key)))
    for round_ in range(2):
        case.agrees("out/lr_per_round", keys.generator_lr * keys.generator_lr_decay**round_, round_)


@replays("fedgen", "fedgen_aggregate")
def aggregate(case: Case, subject: Subject) -> None:
    """The average by n_k of the authors' code, which leaves BatchNorm's statistics with the clients."""
    net, sizes = network(case), case.array("in/train_samples").tolist()
    info = FederationInfo(tuple(sizes), 5, (1, 8, 8), HEAD)
    fusion = plain(as_recorded(subject, "code", generator_steps=1, generator_batch=16)).parts()[1]
    server = fusion.start(net.weights(case.tensor("in/server")), info)
    seen = {name: torch.full_like(one, 2) for name, one in fusion.upload_like(server)[Kind.LABEL_COUNTS].items()}
    uploads = []
    for client, row in enumerate(case.tensor("in/users")):
        sent = Payload({Kind.WEIGHTS: net.weights(row).params}).also(Kind.LABEL_COUNTS, seen)
        uploads.append(Upload(client, sent, sizes[client], 1))
    after = fusion.fuse(server, uploads, RoundContext(0, info))
    case.agrees("out/server_after", net.flat(after.weights))


@replays("fedgen", "fedgen_diversity")
def diversity_loss(case: Case, subject: Subject) -> None:
    """The diversity loss and its gradient, from inside."""
    inside(subject.parts()[1], FedGenFusion)
    z = case.tensor("in/z").requires_grad_()
    found = diversity(z, case.tensor("in/eps"))
    case.agrees("out/diversity", found)
    case.agrees("out/grad_z", torch.autograd.grad(found, z)[0])
