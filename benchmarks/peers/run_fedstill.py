"""fedstill as a contestant: the federation of the job's keys, on the same data."""

from __future__ import annotations

import sys

from contestant import Gate, job_of_command_line, outcome
from measure import Source, federation

from fedstill.execution.allocator import keep_freed_memory


def main() -> None:
    """Run the rounds as they are asked for; further arguments are keys such as execution.executor=threads."""
    job = job_of_command_line()
    gate = Gate()
    keep_freed_memory()  # as `fedstill run` does
    made = federation([*job["keys"], *sys.argv[2:]], Source(**job["source"]))
    state = made.start()
    gate.ready("fedstill")
    for _ in range(job["rounds"]):
        gate.begin()
        state, _ = made.run_round(state)
        gate.end()
    gate.say(**outcome(job, list(state.server.weights.params.values())))
    made.executor.close()


if __name__ == "__main__":
    main()
