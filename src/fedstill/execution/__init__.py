"""How the same numbers are computed: serially, on threads, in processes or as one batched model; on which device."""

from fedstill.execution.executors import Executor, SerialExecutor, ThreadExecutor, intra_op_threads

__all__ = ["Executor", "SerialExecutor", "ThreadExecutor", "intra_op_threads"]
