"""Flower: its FedAvg strategy over Ray, as `run_simulation` runs it; a client app with the plain loop.

Evaluation is off, on the clients and on the server. Strategies of Flower have no SCAFFOLD.
"""

from __future__ import annotations

import torch
from contestant import Gate, job_at, job_of_command_line, network, outcome, own_data, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

ACTORS = 2


def client_app(path: str) -> ClientApp:
    """Return the app of every client; it reads the job once in each actor."""
    app = ClientApp()

    @app.train()
    def one_round(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        job = job_at(path)
        model = network(job)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = own_data(job, int(context.node_config["partition-id"]))
        train(model, x, y, job)
        reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(reply), reply_to=message)

    return app


class Paced(FedAvg):
    """Flower's FedAvg, which waits until a round is asked for."""

    def __init__(self, gate: Gate, **keys: object) -> None:
        super().__init__(**keys)
        self.gate = gate

    def configure_train(self, server_round: int, *rest: object) -> object:
        """Begin a round."""
        self.gate.begin()
        return super().configure_train(server_round, *rest)


def main() -> None:
    """Run the rounds as they are asked for."""
    job = job_of_command_line()
    gate, app = Gate(), ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        part = job["active"] / len(job["shares"])
        strategy = Paced(
            gate, fraction_train=part, fraction_evaluate=0.0, min_train_nodes=job["active"],
            min_available_nodes=len(job["shares"]),
        )  # fmt: skip

        def after(round: int, arrays: ArrayRecord) -> None:
            if round:
                gate.end()

        initial = ArrayRecord(network(job).state_dict())
        gate.ready("flwr", "ray")
        result = strategy.start(grid, initial, job["rounds"], evaluate_fn=after)
        gate.say(**outcome(job, list(result.arrays.to_torch_state_dict().values())))

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": ACTORS}}
    run_simulation(app, client_app(job["path"]), len(job["shares"]), backend_config=backend)


if __name__ == "__main__":
    main()
