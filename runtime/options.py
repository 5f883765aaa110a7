"""The base of everything that params.yaml can set."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """A frozen record of settings: unknown keys, wrong types and impossible values are refused when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def unless(default: Any) -> Any:
    """A field that is not written where it has its default, so that adding it leaves what was written before as it was."""
    return Field(exclude_if=lambda value: value == default)
