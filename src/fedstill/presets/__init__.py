"""Named configurations, one TOML file each; its first comment line is its summary."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from fedstill.names import unknown

DEFAULT = "digits"


def list_presets() -> dict[str, str]:
    """Return name -> one-line summary."""
    found = sorted(item.name for item in files(__name__).iterdir() if item.name.endswith(".toml"))
    return {name.removesuffix(".toml"): _text(name).splitlines()[0].lstrip("# ") for name in found}


def preset(name: str) -> dict[str, Any]:
    """Return a preset's keys.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name not in list_presets():
        raise unknown("preset", name, list_presets())
    return tomllib.loads(_text(f"{name}.toml"))


def _text(file: str) -> str:
    return files(__name__).joinpath(file).read_text(encoding="utf-8")
