"""pfl: FederatedAveraging and SCAFFOLD on its simulated backend, evaluation off.

pfl keeps a user's batches as slices: it neither shuffles nor gathers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from contestant import Gate, job_of_command_line, network, outcome, own_data
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Network(nn.Module):
    """The job's model with the two methods that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the training loss."""
        self.train()
        return F.cross_entropy(self.inner(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Return the loss as pfl counts it; called in the first round only."""
        return {"loss": Weighted(float(F.cross_entropy(self.inner(x), y, reduction="sum")), len(y))}


class Pace(TrainingProcessCallback):
    """Waits until a round is asked for."""

    def __init__(self, gate: Gate, rounds: int) -> None:
        self.gate, self.rounds = gate, rounds

    def on_train_begin(self, *, model: object) -> Metrics:
        """Begin the first round."""
        self.gate.begin()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: object, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """End a round and begin the next."""
        self.gate.end()
        if central_iteration + 1 < self.rounds:
            self.gate.begin()
        return False, Metrics()


def main() -> None:
    """Run the rounds as they are asked for."""
    job = job_of_command_line()
    gate, users = Gate(), range(len(job["shares"]))
    own = {user: PyTorchTensorDataset(own_data(job, user), user_id=str(user)) for user in users}
    dataset = FederatedDataset(own.__getitem__, get_user_sampler("random", list(users)))
    net = Network(network(job))
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    counts = {
        "central_num_iterations": job["rounds"],
        "evaluation_frequency": job["rounds"] + 1,  # only before round 0, which is a warm-up
        "train_cohort_size": job["active"],
        "val_cohort_size": 0,
    }
    if job["method"] == "scaffold":
        algorithm, params = SCAFFOLD(), SCAFFOLDParams(
            **counts, population=len(users), use_gradient_as_control_variate=False,
            user_state_storage=InMemoryUserStateStorage(),
        )  # fmt: skip
    else:
        algorithm, params = FederatedAveraging(), NNAlgorithmParams(**counts)
    gate.ready("pfl")
    algorithm.run(
        params,
        SimulatedBackend(dataset, dataset),
        model,
        NNTrainHyperParams(
            local_batch_size=job["batch_size"], local_num_epochs=job["epochs"], local_learning_rate=job["lr"]
        ),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Pace(gate, job["rounds"])],
        send_metrics_to_platform=False,
    )
    gate.say(**outcome(job, list(net.parameters())))


if __name__ == "__main__":
    main()
