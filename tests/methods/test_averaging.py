"""The average of models: weights by samples, integer buffers, the class-weighted head."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedstill.errors import InputError
from fedstill.methods.averaging import FusionSettings, label_counts, merge
from fedstill.methods.base import FederationInfo, RoundContext, Upload
from fedstill.methods.fedavg import FedAvgFusion
from fedstill.payload import model_payload
from fedstill.weights import Weights, weighted_mean, weighted_sum

INFO = FederationInfo((10, 30), 3, (2,), head="head")
CONTEXT = RoundContext(0, INFO)


def model(value: float, rows: Sequence[Sequence[float]], bias: Sequence[float] | None = None, seen: int = 0) -> Weights:
    params = {"body": torch.tensor([value, -value]), "head.weight": torch.tensor(rows)}
    if bias is not None:
        params["head.bias"] = torch.tensor(bias)
    return Weights(params, {"norm.mean": torch.tensor([value]), "norm.seen": torch.tensor(seen)})


def uploads(*models: Weights, counts: Tensor | None = None) -> list[Upload]:
    return [
        Upload(client, model_payload(one), INFO.samples[client], 1, None if counts is None else counts[client])
        for client, one in enumerate(models)
    ]


def test_clients_count_by_their_samples_or_all_alike() -> None:
    sent = uploads(model(0.0, [[0.0]]), model(4.0, [[8.0]]))
    by_samples = FedAvgFusion().fuse(FedAvgFusion().start(model(9.0, [[9.0]]), INFO), sent, CONTEXT).weights
    assert by_samples.params["body"].tolist() == [3.0, -3.0]
    assert by_samples.params["head.weight"].tolist() == [[6.0]]
    assert by_samples.buffers["norm.mean"].tolist() == [3.0]
    alike = FedAvgFusion(FusionSettings(client_weights="uniform"))
    assert alike.fuse(alike.start(model(9.0, [[9.0]]), INFO), sent, CONTEXT).weights.params["body"].tolist() == [
        2.0,
        -2.0,
    ]


def test_the_mean_of_equal_models_is_that_model_bit_for_bit() -> None:
    one = Weights({"w": torch.randn(1000, generator=torch.Generator().manual_seed(0))}, {"seen": torch.tensor(7)})
    mean = weighted_mean([one] * 7, [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.6])
    assert torch.equal(mean.params["w"], one.params["w"])
    assert torch.equal(mean.buffers["seen"], one.buffers["seen"])


def test_integer_buffers_are_truncated_and_keep_their_type() -> None:
    mean = weighted_mean([model(0.0, [[0.0]], seen=2), model(0.0, [[0.0]], seen=5)], [1.0, 1.0])
    assert mean.buffers["norm.seen"] == torch.tensor(3)
    assert mean.buffers["norm.seen"].dtype == torch.int64


def test_a_sum_needs_one_weight_per_tensor_and_leaves_its_inputs_alone() -> None:
    tensors = [torch.ones(2), torch.ones(2)]
    assert weighted_sum(tensors, [2.0, 0.5]).tolist() == [2.5, 2.5]
    assert all(tensor.tolist() == [1.0, 1.0] for tensor in tensors)
    with pytest.raises(ValueError, match="shorter"):
        weighted_sum(tensors, [1.0])


def test_the_class_weighted_head_by_hand() -> None:
    received = model(7.0, [[70.0, 71.0], [72.0, 73.0], [74.0, 75.0]], [76.0, 77.0, 78.0])
    first = model(0.0, [[4.0, 8.0], [1.0, 1.0], [5.0, 5.0]], [4.0, 1.0, 5.0])
    second = model(4.0, [[0.0, 0.0], [3.0, 9.0], [6.0, 6.0]], [8.0, 2.0, 6.0])
    # Class 0: 3 and 1 samples; class 1: only the second client; class 2: nobody.
    counts = torch.tensor([[3, 0, 0], [1, 6, 0]])
    merged = merge(uploads(first, second, counts=counts), "samples", "class-weighted", received, INFO)
    assert merged.params["head.weight"].tolist() == [[3.0, 6.0], [3.0, 9.0], [74.0, 75.0]]
    assert merged.params["head.bias"].tolist() == [5.0, 2.0, 78.0]
    assert merged.params["body"].tolist() == [3.0, -3.0]  # the rest as ever, by samples
    assert merged.buffers["norm.mean"].tolist() == [3.0]


def test_the_class_weighted_head_without_a_bias_and_through_the_fusion() -> None:
    fusion = FedAvgFusion(FusionSettings(head="class-weighted"))
    assert fusion.needs_label_counts
    assert not FedAvgFusion().needs_label_counts
    server = fusion.start(model(7.0, [[70.0], [71.0], [72.0]]), INFO)
    sent = uploads(model(0.0, [[1.0]] * 3), model(4.0, [[2.0]] * 3), counts=torch.tensor([[1, 1, 0], [0, 1, 0]]))
    assert fusion.fuse(server, sent, CONTEXT).weights.params["head.weight"].tolist() == [
        [1.0],
        [1.5],
        [72.0],
    ]


def test_with_equal_counts_the_class_weighted_head_is_the_uniform_mean() -> None:
    sent = uploads(model(0.0, [[1.0], [2.0], [3.0]]), model(1.0, [[5.0], [6.0], [7.0]]), counts=torch.full((2, 3), 4))
    plain = merge(sent, "uniform", "mean", model(9.0, [[9.0]] * 3), INFO)
    weighted = merge(sent, "uniform", "class-weighted", model(9.0, [[9.0]] * 3), INFO)
    assert all(torch.equal(plain.params[name], value) for name, value in weighted.params.items())


def test_the_class_weighted_head_needs_counts_and_a_head() -> None:
    one, received = model(0.0, [[1.0]] * 3), model(1.0, [[2.0]] * 3)
    with pytest.raises(InputError, match="client 0 has not sent its label counts"):
        merge(uploads(one, one), "samples", "class-weighted", received, INFO)
    counted = uploads(one, one, counts=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"model\.head"):
        merge(counted, "samples", "class-weighted", received, FederationInfo((10, 30), 3, (2,)))
    assert label_counts(counted).tolist() == [[1, 1, 1], [1, 1, 1]]
