"""The public set: what it never holds."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from fedstill.build import Data, build, data_of
from fedstill.data.public import load_public
from fedstill.errors import InputError
from fedstill.evaluation import Evaluation
from small import small

HELD_OUT = ["data.server_validation=60", "data.client_validation=0.2", "data.client_test=0.1"]


def images(data: Data) -> dict[str, set[bytes]]:
    """Return every part's images."""
    train = data.splits.train.x
    held = np.concatenate([np.concatenate(own) for _, *own in data.parts])
    assert data.public is not None
    parts = {
        "test": data.splits.test.x, "validation": data.splits.server_validation.x, "clients": train[held],
        "train": train, "public": data.public.samples.x,
    }  # fmt: skip
    return {name: {one.numpy().tobytes() for one in x} for name, x in parts.items()}


def test_a_data_set_that_is_its_own_public_set_keeps_apart_what_judges() -> None:
    found = images(data_of(small("public.name=digits", *HELD_OUT)))
    for part in ("test", "validation", "clients"):
        assert found[part]
        assert not found[part] & found["public"]
    assert found["train"] & found["public"]  # the clients' own images may be public


def test_some_classes_of_it_keep_apart_too() -> None:
    found = images(data_of(small("public.name=digits", "public.classes=[7, 3]", *HELD_OUT)))
    assert found["test"]
    assert not found["test"] & found["public"]


def test_the_same_images_under_another_name_keep_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module, known = import_module("fedstill.build"), load_public
    monkeypatch.setattr(module, "load_public", lambda name, *rest, **keys: known("digits", *rest, **keys))
    found = images(data_of(small("public.name=digits-again", *HELD_OUT)))
    assert found["validation"]
    assert not (found["test"] | found["validation"]) & found["public"]


def test_more_than_is_left_is_refused() -> None:
    with pytest.raises(InputError, match=r"1797 samples asked for, and there are \d+ of digits besides the 1\d\d by"):
        data_of(small("public.name=digits", "public.samples=1797"))


def test_another_data_set_is_taken_whole() -> None:
    whole = load_public("digits", None, shape=(1, 8, 8), classes=None, samples=None, seed=0)
    assert len(whole.samples) == 1797


def on_clients(*keys: str) -> tuple[Evaluation, list[str]]:
    """Return what measures, and the notes of the beginning."""
    federation, said = build(small('eval.on=["clients"]', *keys))
    federation.executor.close()
    return federation.evaluation, said


def test_clients_are_measured_on_their_test_part_where_they_have_one() -> None:
    keys = ["data.client_validation=0.2", "refinement.accept=clients", "method=fedavg+fedftg"]
    for test_part, size in ((0.0, 10), (0.1, 5)):
        measured, said = on_clients(*keys, f"data.client_test={test_part}")
        assert measured.clients is not None
        assert [len(rows) for rows in measured.clients.rows] == [size] * 4  # of 50 samples each
        assert any("set data.client_test" in one for one in said) is not test_part
