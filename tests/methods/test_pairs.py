"""Every base method with every refinement: two tiny rounds, whatever is registered."""

from __future__ import annotations

import pytest

from fedstill.build import build
from fedstill.errors import InputError
from fedstill.federation import Federation, FederationState, GlobalModel, Record
from fedstill.methods.registry import BASES, REFINEMENTS, compose
from small import play, same_state, same_weights, small, untimed

KEYS = ["public.name=digits", "public.samples=60", "local.epochs=1"]
"""For all; a method that needs no public set does not look at it."""
SMALL_STEPS = {"feddf": ["feddf.steps=4", "feddf.patience=0", "feddf.batch_size=10", "feddf.augment=flip-crop"]}
"""For a refinement, beside what the small configuration has for FedFTG."""
PAIRS = [(base, refinement) for base in sorted(BASES) for refinement in sorted(REFINEMENTS)]


def overrides(base: str, refinement: str) -> list[str]:
    return [f"method={base}+{refinement}", *KEYS, *SMALL_STEPS.get(refinement, [])]


def personal(base: str) -> bool:
    return compose(small(f"method={base}", *KEYS)).objective.personal


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GlobalModel, GlobalModel]]:
    """Return the list in which every round's fused and refined model will stand."""
    seen: list[tuple[GlobalModel, GlobalModel]] = []
    refine = Federation.refine

    def watch(self: Federation, *given: object) -> tuple[tuple[GlobalModel, ...], Record]:
        refined, record = refine(self, *given)  # type: ignore[arg-type]
        fused = given[1]
        assert isinstance(fused, tuple)
        seen.append((fused[0], refined[0]))
        return refined, record

    monkeypatch.setattr(Federation, "refine", watch)
    return seen


def played(*keys: str) -> tuple[FederationState, list[Record]]:
    _, state, records = play(*keys)
    return state, records


@pytest.mark.parametrize(("base", "refinement"), PAIRS)
def test_a_pair_trains_or_says_why_not(base: str, refinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = overrides(base, refinement)
    if personal(base):
        with pytest.raises(InputError, match=f"no global model for '{refinement}' to refine"):
            build(small(*keys))
        return
    seen = watched(monkeypatch)
    state, records = played(*keys)
    assert len(seen) == 2
    for fused, refined in seen:
        assert refined.server.weights.all_finite()
        assert not same_weights(fused.server.weights, refined.server.weights)
        assert fused.server.weights.params.keys() == refined.server.weights.params.keys()
    assert same_weights(state.server.weights, seen[1][1].server.weights)
    assert records[1]["refinement"][refinement]["student_loss"] >= 0

    other, again = played(*keys, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, other)
    assert untimed(records) == untimed(again)


def test_both_kinds_of_base_are_among_the_pairs() -> None:
    kinds = {personal(base) for base in BASES}
    assert False in kinds
    assert {"fedavg", "fedprox", "scaffold"} <= {base for base in BASES if not personal(base)}


def test_refinements_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    keys = ["method=fedavg+fedftg+feddf", *KEYS, *SMALL_STEPS["feddf"]]
    state, records = played(*keys)
    assert set(records[0]["refinement"]) == {"fedftg", "feddf"}
    assert len(state.refinements) == 2
    assert "generator" in state.refinements[0]
    assert state.refinements[1] == {}
    alone, _ = played("method=fedavg+fedftg", *KEYS)
    assert not same_weights(alone.server.weights, state.server.weights)
    assert len(seen) == 4
