"""placeholder so that helpers can import; replaced below"""
from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PluginOptions(BaseModel):
    """What every plugin's `Options` derive from: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
