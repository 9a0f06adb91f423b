"""What every section of a configuration has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError

__all__ = ["Depth", "Section"]

_LARGEST = 2**53
"""No count, size or seed is larger; floats and JSON hold every whole number up to it."""
_LONGEST = 4096
"""Characters of a name, a path or another text."""


class Section(BaseModel):
    """Frozen; no unknown keys; the sentence under a field is what the documentation says of it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take ``true`` and ``yes`` for 1."""
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("should not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _in_reason(cls, value: Any) -> Any:
        """Refuse numbers that overflow somewhere, and texts that no file could have as its name."""
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"should be at most {_LARGEST}")
        if isinstance(value, str | Path | DepthSpec) and len(str(value)) > _LONGEST:
            raise ValueError(f"should have at most {_LONGEST} characters")
        if isinstance(value, str | Path) and "\0" in str(value):
            raise ValueError("should hold no zero byte")
        return value


def _read_depth(value: Any) -> DepthSpec:
    if isinstance(value, DepthSpec):
        return value
    if not isinstance(value, str | int):
        raise PydanticKnownError("string_type")
    try:
        return DepthSpec.parse(value)
    except MegaloopError as error:
        raise ValueError(str(error).removeprefix("depth: ")) from None


Depth = Annotated[DepthSpec, PlainValidator(_read_depth), PlainSerializer(str, return_type=str)]
"""A depth in a configuration: text (YAML reads 24 layers as a number), which is read when it is validated."""
