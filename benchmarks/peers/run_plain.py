"""FedAvg in plain PyTorch: what a round costs without any library."""

from __future__ import annotations

import random

from contestant import Gate, job_of_command_line, load, network, outcome, own_data, train


def main() -> None:
    """Run the rounds as they are asked for."""
    job = job_of_command_line()
    gate, model, chosen = Gate(), network(job), random.Random(job["seed"])
    current = [value.clone() for value in job["initial"]]
    gate.ready()
    for _ in range(job["rounds"]):
        gate.begin()
        total = [value.new_zeros(value.shape) for value in current]
        cohort = chosen.sample(range(len(job["shares"])), job["active"])
        seen = sum(len(job["shares"][client]) for client in cohort)
        for client in cohort:
            load(model, current)
            x, y = own_data(job, client)
            train(model, x, y, job)
            for mean, value in zip(total, model.parameters(), strict=True):
                mean.add_(value.detach(), alpha=len(y) / seen)
        current = total
        gate.end()
    gate.say(**outcome(job, current))


if __name__ == "__main__":
    main()
