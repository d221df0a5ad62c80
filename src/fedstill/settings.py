"""The base of every settings class: frozen, and strict about unknown keys and wrong types."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Hyper-parameters of one part; a typed table of the TOML configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModedSettings(Settings):
    """Settings with a key ``mode`` that sets other keys where they are not given.

    ``MODES`` says what each mode sets; what a mode leaves out has the field's own default.
    """

    MODES: ClassVar[dict[str, dict[str, object]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _mode_fills_what_is_not_given(cls, given: Any) -> Any:
        return {**cls.MODES.get(str(given.get("mode", "paper")), {}), **given} if isinstance(given, dict) else given

    @classmethod
    def set_by(cls, mode: str) -> dict[str, object]:
        """Return the value of every key that some mode sets, as ``mode`` has it."""
        touched = {key for keys in cls.MODES.values() for key in keys}
        own = cls.MODES.get(mode, {})
        return {key: own.get(key, cls.model_fields[key].default) for key in sorted(touched)}
