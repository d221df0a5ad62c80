"""The configuration by dotted keys, such as ``train.rounds``."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

from fedstill.config.schema import Config


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Return every dotted key of the configuration, and the types that its value may have."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, field in model.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        tables = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        found |= keys(tables[0], f"{prefix}{name}.") if tables else {f"{prefix}{name}": parts}
    return found


def flat(config: Config) -> dict[str, Any]:
    """Return a configuration by dotted keys; several models count as ``model.0.name``."""

    def entries(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from entries(f"{prefix}.{key}" if prefix else key, part)
        else:
            yield prefix, value

    tables = config.model_dump(mode="json")
    models = tables["model"]
    tables["model"] = models[0] if len(models) == 1 else {str(place): model for place, model in enumerate(models)}
    return dict(entries("", tables))


def nearest_key(key: str, model: type[BaseModel] = Config) -> str | None:
    """Return the most similar key there is; a right last part in another table counts."""
    known = list(keys(model))
    tables = [name for name in model.model_fields if name not in known]
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    near = get_close_matches(key, known + tables, n=1, cutoff=0.6)
    close = get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in known], n=1, cutoff=0.75)
    by_leaf = [name for name in known if close and name.rsplit(".", 1)[-1] == close[0]]
    return next(iter(elsewhere or near or by_leaf), None)
