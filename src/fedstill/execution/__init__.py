"""How the same numbers are computed: serially or on threads, on which device."""

from fedstill.execution.executors import Executor, SerialExecutor, ThreadExecutor, intra_op_threads

__all__ = ["Executor", "SerialExecutor", "ThreadExecutor", "intra_op_threads"]
