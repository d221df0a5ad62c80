"""fluke: its FedAVG and SCAFFOLD on its fast loader, models in memory, evaluation off."""

from __future__ import annotations

import torch
from contestant import Gate, Job, job_of_command_line, network, outcome, own_data
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.algorithms.scaffold import SCAFFOLD
from fluke.data import FastDataLoader
from fluke.utils import FederationObserver


class Shares:
    """The job's clients, as a data splitter of fluke."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def assign(self, clients: int, batch_size: int) -> object:
        """Return a loader for each client, and no test data."""
        classes = self.job["classes"]
        own = [
            FastDataLoader(*own_data(self.job, client), num_labels=classes, batch_size=batch_size, shuffle=True)
            for client in range(clients)
        ]
        return (own, [None] * clients), None


class Pace(FederationObserver):
    """Waits until a round is asked for."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def start_round(self, round: int, global_model: object) -> None:
        """Begin a round."""
        self.gate.begin()

    def end_round(self, round: int) -> None:
        """End a round."""
        self.gate.end()


def main() -> None:
    """Run the rounds as they are asked for."""
    job = job_of_command_line()
    gate, clients = Gate(), len(job["shares"])
    environment = FlukeENV()
    environment.set_seed(job["seed"])
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    keys = {
        "model": network(job),
        "client": {
            "batch_size": job["batch_size"],
            "local_epochs": job["epochs"],
            "loss": torch.nn.CrossEntropyLoss,
            "optimizer": {"name": "SGD", "lr": job["lr"]},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
        },
        "server": {"weighted": True},
    }
    method = SCAFFOLD if job["method"] == "scaffold" else FedAVG
    algorithm = method(clients, Shares(job), DDict(keys))
    algorithm.set_callbacks([Pace(gate)])
    gate.ready("fluke-fl")
    # At the end fluke evaluates and sends the model to everyone, after the last round's clock has stopped.
    algorithm.run(job["rounds"], job["active"] / clients)
    gate.say(**outcome(job, list(algorithm.server.model.parameters())))


if __name__ == "__main__":
    main()
