"""The base of every settings class: frozen, and strict about unknown keys and wrong types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

LARGEST_NUMBER = 1e30
"""Largest size of a number in a configuration: what is computed from it, such as Adam's ten times a learning rate in
its first step, is a float32 too."""
LARGEST_WHOLE = 2**63 - 1
"""Largest size of a whole number in a configuration: a tensor's."""


class Settings(BaseModel):
    """Hyper-parameters of one part; a typed table of the TOML configuration."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _fits_a_tensor(cls, value: Any) -> Any:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and abs(one) > LARGEST_NUMBER:
                raise ValueError(f"a number is at most {LARGEST_NUMBER:g} in size")
            if isinstance(one, int) and abs(one) > LARGEST_WHOLE:
                raise ValueError(f"a whole number is at most {LARGEST_WHOLE} in size")
        return value


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


def none_as(value: object) -> Callable[[object], object]:
    """Return a validator that reads the word ``none``, which TOML has no value for, as ``value``."""
    return lambda given: value if given == "none" else given
