"""fedstill: federated learning by distillation.

``fedstill.run(config)`` runs an experiment. The parts stand alone too: :func:`make_partition` shares data among
clients, :class:`LocalTrainer` trains one of them, :class:`FedFTG` and :class:`FedDF` refine a model from any list of
teachers.
"""

from fedstill import presets
from fedstill.build import build
from fedstill.callbacks import Callback, RunInfo, StopRun
from fedstill.client import ClientWork, LocalTrainer
from fedstill.config import Config, load_config
from fedstill.data import load_dataset, make_partition
from fedstill.errors import FedstillError, InputError, RunError
from fedstill.evaluation import evaluate
from fedstill.experiment import Result, accuracies, resume, run
from fedstill.federation import Federation
from fedstill.methods.feddf import FedDF, FedDFSettings
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.models import build_model
from fedstill.trackers import MLflowTracker, WandbTracker

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "ClientWork",
    "Config",
    "FedDF",
    "FedDFSettings",
    "FedFTG",
    "FedFTGSettings",
    "Federation",
    "FedstillError",
    "InputError",
    "LocalTrainer",
    "MLflowTracker",
    "Result",
    "RunError",
    "RunInfo",
    "StopRun",
    "WandbTracker",
    "accuracies",
    "build",
    "build_model",
    "evaluate",
    "load_config",
    "load_dataset",
    "make_partition",
    "presets",
    "resume",
    "run",
]
