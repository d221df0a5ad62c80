"""The conformance suite: right methods pass, wrong ones are caught by the check that is named for them."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedstill import cli
from fedstill.client import Site
from fedstill.conformance import Finding, Verdict, check_method, conformance, list_checks
from fedstill.conformance.bench import Play, cross_entropy, network, optimum, quadratics, slope
from fedstill.conformance.findings import CHECKS, agree, all_of, differ
from fedstill.conformance.released import DEVIATIONS, Deviation
from fedstill.conformance.replays import OWN, REPLAYS
from fedstill.conformance.runner import named
from fedstill.conformance.wrong import WRONG, Wrong
from fedstill.errors import InputError
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.base import (
    FederationInfo,
    LocalObjective,
    LocalTask,
    Method,
    RoundContext,
    ServerState,
    Turn,
    Upload,
)
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.feddf import FedDF
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective, FedDynSettings
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.methods.registry import BASES, REFINEMENTS
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective, ScaffoldSettings
from fedstill.payload import Kind, Payload, model_payload, scalars
from fedstill.training import Trained
from fedstill.weights import State, Weights, weighted_sum

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
CASES = "agrees-with-reference-cases"
SILENT = {
    "alone": {"batchnorm-buffers", CASES},
    "fedavg": {"state-outlives-absence"},
    "fedprox": {"state-outlives-absence"},
    "fedgen": {"state-outlives-absence"},
    "feddistill": {"batchnorm-buffers", CASES},
    "fedmd": {"batchnorm-buffers", "steps-batch-over-clients"},
}
"""Checks that do not apply to a built-in method: it keeps nothing, shares no buffers, does not train by SGD, or
has no code whose numbers were recorded."""
RAISES = {"fedavg-looks-at-values", "fedprox-lossy-mu"}
"""Wrong methods whose mistake is an exception."""


def by_held(found: Sequence[Finding]) -> dict[bool | None, set[str]]:
    return {held: {one.check for one in found if one.held is held} for held in (True, False, None)}


# The proof


@pytest.mark.parametrize("name", [*BASES, *(f"+{name}" for name in REFINEMENTS)])
def test_a_right_method_passes_every_check_that_applies(name: str) -> None:
    found = conformance([name])
    assert [one for one in found if one.held is False] == []
    assert by_held(found)[None] == SILENT.get(name, set())
    family = {check.name for check in list_checks() if name.removeprefix("+") in check.families}
    assert family <= by_held(found)[True]
    assert len(family) >= 2


@pytest.mark.parametrize("wrong", WRONG.values(), ids=lambda wrong: wrong.name)
def test_a_wrong_method_is_caught_by_the_check_that_is_named_for_it(wrong: Wrong) -> None:
    found = check_method(wrong.make, wrong.name, like=wrong.like, only=wrong.caught_by)
    assert {(one.check, one.held) for one in found} == {(check, False) for check in wrong.caught_by}
    assert any("Error" in one.detail for one in found) == (wrong.name in RAISES)


def test_every_check_catches_something() -> None:
    assert {check for wrong in WRONG.values() for check in wrong.caught_by} == CHECKS.keys()
    assert all(wrong.mistake and wrong.caught_by for wrong in WRONG.values())


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda one: f"{one.method} {next(iter(one.keys))}")
def test_released_forms_are_reported_as_what_they_are(deviation: Deviation) -> None:
    found = conformance([deviation.method], keys=deviation.keys)
    assert by_held(found)[False] == set(deviation.fails)
    assert not any("Error" in one.detail for one in found if one.held is False)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("moon", {"moon.mode": "code"}),
        ("fedmd", {"fedmd.mode": "code"}),
        ("scaffold", {"scaffold.client_weights": "uniform"}),
        ("feddyn", {"feddyn.client_weights": "uniform"}),
        ("feddistill", {"feddistill.share": "weights"}),
        ("fedgen", {"fedgen.share": "predictor"}),
        ("fedavg", {"fusion.head": "class-weighted"}),
        ("+fedftg", {"fedftg.level": "feature"}),
    ],
)
def test_other_choices_conform_where_they_are_the_papers(name: str, keys: dict[str, object]) -> None:
    assert by_held(conformance([name], keys=keys))[False] == set()


# Somebody else's


@dataclass(frozen=True)
class MyObjective(LocalObjective):
    """SCAFFOLD again, written otherwise: the correction is in the loss, and the state has other names."""

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        c, omega = received[Kind.CONTROL_VARIATE], received.scalar("omega")
        mine = state.get("mine", {})
        return {"push": {name: value / omega - mine.get(name, 0) for name, value in c.items()}}

    def loss(self, model, params, buffers, x, y, extras):  # type: ignore[no-untyped-def]
        linear = sum((extras["push"][name] * value).sum() for name, value in params.items())
        return super().loss(model, params, buffers, x, y, extras) + linear

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        c, sent, mine = received[Kind.CONTROL_VARIATE], received[Kind.WEIGHTS], state.get("mine", {})
        kept = {
            name: mine.get(name, 0) - c[name] + (sent[name] - value) / (trained.steps * task.lr)
            for name, value in trained.weights.params.items()
        }
        change = {name: value - mine.get(name, 0) for name, value in kept.items()}
        return model_payload(trained.weights).also(Kind.CONTROL_VARIATE, change), {"mine": kept}


class MyFusion:
    """The server's half, with c under another name; no settings, no dataclass."""

    needs_label_counts = False
    client_weights = "uniform"
    across_architectures = False

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        return ServerState(weights, {"ours": {name: torch.zeros_like(v) for name, v in weights.params.items()}})

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        payload = model_payload(server.weights).also(Kind.CONTROL_VARIATE, server.method["ours"])
        return payload.also(Kind.SCALARS, scalars(omega=info.omega(client)))

    def upload_like(self, server: ServerState) -> Payload:
        return model_payload(server.weights).also(Kind.CONTROL_VARIATE, server.method["ours"])

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        models, info = [upload.weights for upload in uploads], context.info
        even = [1 / len(models)] * len(models)

        def mean(part: str, name: str) -> Tensor:
            return weighted_sum([getattr(model, part)[name] for model in models], even)

        weights = Weights(
            {name: mean("params", name) for name in server.weights.params},
            {name: mean("buffers", name) for name in server.weights.buffers},
        )
        ours = {
            name: value
            + sum(info.omega(one.client) / info.size * one.payload[Kind.CONTROL_VARIATE][name] for one in uploads)
            for name, value in server.method["ours"].items()
        }
        return ServerState(weights, {"ours": ours})


def test_a_right_method_that_was_written_elsewhere_passes() -> None:
    # Ready-made objects without settings are taken to have the paper's.
    found = check_method((MyObjective(), MyFusion()), "mine", like="scaffold")
    assert by_held(found)[False] == set()
    assert {one.method for one in found} == {"mine"}
    # It has no key for the other form, and says so.
    assert by_held(found)[None] == {"scaffold-reaches-the-mean-optimum", "scaffold-current-rate"}
    assert {"scaffold-reaches-the-pooled-optimum", CASES} <= by_held(found)[True]


def test_without_like_only_the_general_checks_run() -> None:
    found = check_method((MyObjective(), MyFusion()))
    general = {check.name for check in list_checks() if not check.families and not check.refines}
    assert {one.check for one in found} == general
    assert {one.method for one in found} == {"MyObjective"}
    assert by_held(found)[False] == set()


class Broken(FedAvgObjective):
    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        raise KeyError("what\nis this")


def test_an_exception_is_a_finding_with_its_text() -> None:
    found = check_method((Broken(), FedAvgFusion()), "broken", only=["inputs-not-changed", "same-bits-twice"])
    assert [(one.held, one.detail) for one in found] == [(False, "KeyError: 'what\\nis this'")] * 2


def test_objects_with_settings_are_made_anew_with_other_numbers_and_keep_their_switches() -> None:
    right = Method("feddyn", FedDynObjective(), FedDynFusion(FedDynSettings(alpha=0.02)))
    held = by_held(check_method(right))
    assert held[False] == set()
    assert "feddyn-reaches-the-pooled-optimum" in held[True]
    uniform = (FedDynObjective(), FedDynFusion(FedDynSettings(client_weights="uniform")))
    told = check_method(uniform, "feddyn", only=["feddyn-reaches-the-pooled-optimum"])[0]
    assert told.held is None
    assert "feddyn.client_weights = 'samples', which is fixed at 'uniform'" in told.detail
    code = ScaffoldSettings(mode="code")
    parts = ScaffoldObjective(code), ScaffoldFusion(code)
    assert check_method(parts, like="scaffold", only=["scaffold-current-rate"])[0].held is False


def test_a_composed_method_is_checked_part_by_part() -> None:
    method = Method("fedavg+fedftg", FedAvgObjective(), FedAvgFusion(), (FedFTG(FedFTGSettings(mode="code")),))
    found = check_method(method)
    assert {one.method for one in found} == {"fedavg+fedftg", "+fedftg"}
    assert {one.method for one in found if one.held is False} == {"+fedftg"}
    assert {one.method for one in check_method(FedDF(), only=["feddf-average-of-logits"])} == {"+feddf"}
    uniform = FedAvgFusion(FusionSettings(client_weights="uniform"))
    assert by_held(check_method((FedAvgObjective(), uniform), "fedavg"))[False] == set()


def fails(config: object) -> Any:
    raise ZeroDivisionError("no\nmethod")


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        (fails, {}, "its factory failed: ZeroDivisionError: no"),
        (lambda config: 3, {"name": "three"}, "'three': its factory made int"),
        (5, {}, "int is no method"),
        ((1, 2, 3), {}, "a method is"),
        ("nothing", {}, "unknown method 'nothing'"),
        ("+", {}, "unknown"),
        ("math:nothing", {}, "cannot be imported"),
        ("fedavg", {"like": "fedavgg"}, "did you mean 'fedavg'"),
        ("fedavg", {"only": ["same-bits"]}, "did you mean 'same-bits-twice'"),
        ("fedavg", {"keys": {"fedprox.mu": -1.0}}, "fedprox.mu"),
    ],
)
def test_what_is_no_method_is_refused(method: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_method(method, **more)


# The parts


def test_the_squares_in_disguise_are_squares_with_the_optimum_that_is_said() -> None:
    problem = quadratics()
    w = torch.tensor([0.3, -1.1], dtype=torch.float64, requires_grad=True)
    for own in problem.clients:
        square = 0.5 * (own.x[:, :2] @ w - own.x[:, 2]).square().mean() + 1
        loss = cross_entropy(problem.model({"w": w}, {}, own.x, train=True), own.y)
        assert float(loss.detach()) == pytest.approx(float(square.detach()), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, w)[0], slope(own, w.detach()))
    pooled = sum(len(own) * slope(own, optimum(problem, by_samples=True)) for own in problem.clients)
    mean = sum(slope(own, optimum(problem, by_samples=False)) for own in problem.clients)
    assert float(pooled.norm()) < 1e-9
    assert float(mean.norm()) < 1e-9
    assert torch.dist(optimum(problem, True), optimum(problem, False)) > 1


def test_numbers_that_differ_are_seen() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": {"c": torch.tensor(3)}}
    assert agree(one, one, 0, "it").detail == "it: the same bits"
    for other in (
        {"a": torch.tensor([1.0, 2.0])},
        {**one, "a": torch.tensor([1.0])},
        {**one, "a": torch.tensor([1.0, math.nan])},
        {**one, "b": {"c": torch.tensor(3.0)}},
    ):
        assert not agree(one, other, 1e9, "it").held
    assert agree(one, {**one, "a": torch.tensor([1.0, 2.5])}, 0.5, "it").held
    assert not agree(one, {**one, "a": torch.tensor([1.0, 2.5])}, 0.4, "it").held
    assert differ(one, {**one, "a": torch.tensor([1.0, 2.5])}, "it").held
    assert not differ(one, one, "it").held
    bad, good = Verdict(False, "bad"), Verdict(True, "good")
    assert all_of(good, bad, good) == bad
    assert all_of(good, good).detail == "good; good"
    assert "4 comparisons" in all_of(*[good] * 4).detail


def test_given_keys_stay_and_the_numbers_of_a_mode_give_way_to_what_a_check_needs() -> None:
    free = named("moon", None, {})[0]
    assert free.near(mu=0.0).config.moon.mu == 0
    code = named("moon", None, {"moon.mode": "code"})[0]
    assert code.near(mu=1.0).config.moon.mu == 0.5
    assert code.where(mu=1.0).config.moon.mu == 1
    given = named("moon", None, {"moon.mu": 2.0})[0]
    assert given.near(mu=1.0).config.moon.mu == 2
    found = check_method("moon", keys={"moon.mu": 2.0}, only=["moon-without-mu-is-fedavg"])
    assert found[0].held is None
    assert found[0].detail == "it needs moon.mu = 0.0, which is fixed at 2.0"


def test_the_bench_plays_the_rounds_that_a_federation_plays() -> None:
    subject = named("fedavg", None, {"fusion.head": "class-weighted"})[0]
    play = Play(subject, network(), batch_size=4)
    uploads = play.play((0, 1, 2))
    assert [upload.samples for upload in uploads] == [4, 6, 10]
    assert all(
        upload.label_counts is not None and int(upload.label_counts.sum()) == upload.samples for upload in uploads
    )
    again = play.play((0, 1))
    assert Kind.LABEL_COUNTS not in again[0].payload  # asked for once
    assert again[0].label_counts is not None
    assert again[0].steps == 3


# The reference cases


def cases_of(method: Any, **more: Any) -> Finding:
    only = [CASES, f"refinement-{CASES}"]
    (found,) = check_method(method, only=only, **more)
    return found


@pytest.mark.parametrize(
    "name", [*(name for name in BASES if CASES not in SILENT.get(name, ())), *(f"+{name}" for name in REFINEMENTS)]
)
def test_every_case_of_a_built_in_method_is_replayed(name: str) -> None:
    own = [replay.case for replay in REPLAYS.values() if replay.family == name.removeprefix("+")]
    found = cases_of(name)
    assert found.held is True
    assert f"{len(own)} case" in found.detail
    assert all(case in found.detail.partition("; widest: ")[0] for case in own)
    assert "not compared" not in found.detail


def test_somebody_elses_method_is_compared_with_the_numbers_too() -> None:
    found = cases_of((MyObjective(), MyFusion()), like="scaffold")
    assert found.held is True
    assert found.detail.startswith("3 cases agree: local_scaffold, local_scaffold_bn, server_scaffold; ")
    assert "not compared: server_scaffold_bn_lrdecay: it needs scaffold." in found.detail
    # A factory that claims to have the code's form is held to it; nobody else is.
    mine: Any = lambda config: (MyObjective(), MyFusion())  # noqa: E731
    assert "server_scaffold_bn_lrdecay: it is a form of the authors' code" in cases_of(mine, like="scaffold").detail
    found = cases_of(mine, like="scaffold", keys={"scaffold.mode": "code"})
    assert found.held is False
    assert found.detail.startswith("server_scaffold_bn_lrdecay: out/")
    assert "; 3 cases agree: " in found.detail


def test_keys_that_are_fixed_leave_cases_out() -> None:
    assert cases_of("scaffold", keys={"scaffold.mode": "code"}).detail.startswith("4 cases agree")
    assert cases_of("scaffold", keys={"scaffold.mode": "paper"}).detail.startswith("3 cases agree")
    uniform = cases_of("scaffold", keys={"scaffold.client_weights": "uniform"})
    assert uniform.detail.startswith("2 cases agree: local_scaffold, local_scaffold_bn;")
    none = cases_of("fedprox", keys={"fedprox.kind": "weight_decay_bug"})
    assert none.held is None
    assert none.detail.count("it needs fedprox.kind = 'proximal'") == 1


class MyTeacher(FedFTG):
    """Somebody else's: what is inside is nobody's business."""


class MyLoop(FedAvgObjective):
    def run(self, site: Site) -> Turn:
        return Turn(model_payload(site.received.weights()), {}, 1, 0.0)


def test_what_cannot_be_looked_into_is_left_out() -> None:
    inside = cases_of(MyTeacher(FedFTGSettings()), name="+mine", like="fedftg")
    assert inside.held is None
    assert inside.detail.endswith("it compares the inside of the built-in method")
    own_loop = cases_of((MyLoop(), FedAvgFusion()), name="mine", like="fedavg")
    assert own_loop.held is False  # it does not learn
    assert own_loop.detail.startswith("server_fedavg: out/w_client is ")
    assert "local_fedavg, local_fedavg_bn: it does not train by the site's SGD loop" in own_loop.detail
    assert "say which one this is like" in cases_of((MyObjective(), MyFusion())).detail


def test_other_cases_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in (".json", ".npz"):
        shutil.copy(OWN / f"local_fedavg{ending}", tmp_path)
    assert cases_of("fedavg", references=tmp_path).detail.startswith("1 case agrees: local_fedavg;")
    assert cases_of("scaffold", references=tmp_path).held is None
    with np.load(OWN / "local_fedavg.npz") as stored:
        changed = {key: stored[key] for key in stored.files}
    changed["out/w_after_step"][-1, 5] += 1e-3
    np.savez(tmp_path / "local_fedavg.npz", **changed)
    found = cases_of("fedavg", references=tmp_path)
    assert found.held is False
    assert found.detail.startswith("local_fedavg: out/w_after_step is 0.001 from what is recorded")
    monkeypatch.setenv("FEDSTILL_GOLDEN", str(tmp_path))
    assert cases_of("fedavg").detail == found.detail
    monkeypatch.setenv("FEDSTILL_GOLDEN", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"elsewhere has none of the reference cases.*FEDSTILL_GOLDEN"):
        cases_of("fedavg")


# The page and the command


def test_the_page_tells_of_every_check_and_of_every_wrong_method() -> None:
    page = " ".join(PAGE.read_text().split())
    for check in list_checks():
        assert f"- **`{check.name}`** ({check.scope}). {check.what} *Without it:* {check.without}" in page
    for wrong in WRONG.values():
        by = ", ".join(f"`{name}`" for name in wrong.caught_by)
        assert f"| `{wrong.name}` | {wrong.mistake} | {by} |".replace("||", "\\|\\|") in page
    for one in DEVIATIONS:
        keys = ", ".join(f"`{key} = {value}`" for key, value in one.keys.items())
        fails = ", ".join(f"`{name}`" for name in one.fails)
        assert f"| `{one.method}`, {keys} | {one.why} | {fails} |".replace("||", "\\|\\|") in page


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["fedstill", "conformance", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "fedprox") == 0
    told = capsys.readouterr().out
    assert "fedprox  fedprox-rounds-by-hand  holds" in told
    assert "0 fail" in told
    assert command(monkeypatch, "fedprox", "fedprox.kind=weight_decay_bug") == 1
    told = capsys.readouterr().out
    assert "fedprox  fedprox-pulls-to-what-was-sent  FAILS  from the optimum" in told
    assert "2 fail" in told
    path = "fedstill.conformance.wrong.moon:moon_wrong_positive"
    assert command(monkeypatch, "--method", path, "--like", "moon") == 1
    assert f"{path}  moon-steps-by-hand  FAILS" in capsys.readouterr().out
    path = "fedstill.conformance.wrong.fedftg:fedftg_in_place"
    assert command(monkeypatch, "--method", path, "--like", "fedftg") == 1
    assert f"+{path}  refinement-leaves-its-inputs  FAILS" in capsys.readouterr().out
    assert command(monkeypatch, "--list") == 0
    told = capsys.readouterr().out
    assert [line.split("  ")[0] for line in told.splitlines()] == [check.name for check in list_checks()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "unknown method 'nothing'"),
        (["scaffold.mode=mine"], "scaffold.mode"),
        (["scafold.mode=code"], "did you mean"),
        (["--like", "moon"], "name it with --method"),
        (["moon", "--method", "math:sin"], "do not go together"),
        (["--references", "nowhere"], "there is no folder nowhere"),
        (["scaffold", "--references", "."], "has none of the reference cases"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert says in told.err
    assert told.err.count("\n") == 1


def test_a_tables_rows_are_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from fedstill.conformance.report import print_checks, print_findings

    console = Console(force_terminal=True, width=200, color_system=None)
    print_findings([replace(Finding("[mine]", "a-check", False, "[bold]no[/]"), check="a-check")], console)
    print_checks(console)
    told = capsys.readouterr().out
    assert "[mine]" in told
    assert "[bold]no[/]" in told
    assert "scaffold-rounds-by-hand" in told
