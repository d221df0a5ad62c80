"""Data: the sources, what an experiment takes of them, who holds it, and how it is augmented and drawn."""

from fedstill.data.augment import augment, list_augmentations
from fedstill.data.dataset import DataSet, RawDataSet, Samples
from fedstill.data.partition import Partition, client_parts, list_protocols, make_partition, notes
from fedstill.data.picture import draw_partition
from fedstill.data.sources import list_datasets, load_dataset, load_raw
from fedstill.data.splits import Splits, split

__all__ = [
    "DataSet",
    "Partition",
    "RawDataSet",
    "Samples",
    "Splits",
    "augment",
    "client_parts",
    "draw_partition",
    "list_augmentations",
    "list_datasets",
    "list_protocols",
    "load_dataset",
    "load_raw",
    "make_partition",
    "notes",
    "split",
]
