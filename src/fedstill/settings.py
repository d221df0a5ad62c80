"""The base of every settings class: frozen, and strict about unknown keys and wrong types."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Hyper-parameters of one part; a typed table of the TOML configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
