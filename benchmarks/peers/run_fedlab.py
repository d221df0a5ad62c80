"""FedLab: its standalone pipeline with its serial trainer, FedAvg and SCAFFOLD, on PyTorch's DataLoader."""

from __future__ import annotations

from contestant import Gate, Job, job_of_command_line, network, outcome, own_data
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.contrib.algorithm.fedavg import FedAvgSerialClientTrainer
from fedlab.contrib.algorithm.scaffold import ScaffoldSerialClientTrainer, ScaffoldServerHandler
from fedlab.contrib.dataset.basic_dataset import FedDataset
from fedlab.core.standalone import StandalonePipeline
from torch.utils.data import DataLoader, TensorDataset


class Shares(FedDataset):
    """The job's clients."""

    def __init__(self, job: Job) -> None:
        self.own = [TensorDataset(*own_data(job, client)) for client in range(len(job["shares"]))]

    def get_dataloader(self, id: int, batch_size: int, type: str = "train") -> DataLoader:
        """Return a client's batches."""
        return DataLoader(self.own[id], batch_size=batch_size, shuffle=True)


class Paced(StandalonePipeline):
    """FedLab's pipeline, which waits until a round is asked for."""

    def __init__(self, handler: object, trainer: object, gate: Gate, rounds: int) -> None:
        super().__init__(handler, trainer)
        self.gate, self.left = gate, rounds

    def evaluate(self) -> None:
        """End a round and begin the next."""
        self.gate.end()
        self.left -= 1
        if self.left:
            self.gate.begin()


def main() -> None:
    """Run the rounds as they are asked for."""
    job = job_of_command_line()
    gate, clients = Gate(), len(job["shares"])
    scaffold = job["method"] == "scaffold"
    handler_of, trainer_of = (
        (ScaffoldServerHandler, ScaffoldSerialClientTrainer)
        if scaffold
        else (SyncServerHandler, FedAvgSerialClientTrainer)
    )
    handler = handler_of(network(job), job["rounds"], job["active"] / clients)
    trainer = trainer_of(network(job), clients)
    if scaffold:
        handler.setup_optim(lr=1.0)
    trainer.setup_dataset(Shares(job))
    trainer.setup_optim(job["epochs"], job["batch_size"], job["lr"])
    pipeline = Paced(handler, trainer, gate, job["rounds"])
    gate.ready("fedlab")
    gate.begin()
    pipeline.main()
    gate.say(**outcome(job, list(handler.model.parameters())))


if __name__ == "__main__":
    main()
