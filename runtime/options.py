"""The base of everything that params.yaml can set."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """A frozen record of settings: unknown keys, wrong types and impossible values are refused when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
