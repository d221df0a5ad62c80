"""The typed configuration: the schema of the TOML file, its overrides, and its errors."""

from fedstill.config.dotted import flat, keys, nearest_key
from fedstill.config.problems import explained
from fedstill.config.reading import Table, config_from, config_with, load_config, parse_override, read_toml
from fedstill.config.schema import (
    Config,
    EvalSettings,
    LocalSettings,
    SeedSettings,
    TrackingSettings,
)
from fedstill.config.writing import to_toml

__all__ = [
    "Config",
    "EvalSettings",
    "LocalSettings",
    "SeedSettings",
    "Table",
    "TrackingSettings",
    "config_from",
    "config_with",
    "explained",
    "flat",
    "keys",
    "load_config",
    "nearest_key",
    "parse_override",
    "read_toml",
    "to_toml",
]
