"""Client models, the generators, and ways to look into them and to run them on given weights."""

from fedstill.models.anatomy import batch_norms, check_width, find_head, parameter_count, split_state
from fedstill.models.backbones import build_model, list_models
from fedstill.models.feature_generator import FeatureGenerator
from fedstill.models.generators import ConditionalGenerator
from fedstill.models.layers import Backbone, Dropout, Norm, initial_weights
from fedstill.models.stateless import Stateless

__all__ = [
    "Backbone",
    "ConditionalGenerator",
    "Dropout",
    "FeatureGenerator",
    "Norm",
    "Stateless",
    "batch_norms",
    "build_model",
    "check_width",
    "find_head",
    "initial_weights",
    "list_models",
    "parameter_count",
    "split_state",
]
