"""Classes of plugins of which a process uses one: transports and sets of codecs."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from dl_inference_core.config import PluginOptions


class Choosable(ABC):
    """The config names one, or says "auto": the installed one with the highest priority that can run here.

    Attributes:
        name: as the config has it.
        priority: of two with the same priority, "auto" takes the one that was found first.
    """

    name: ClassVar[str]
    Options: ClassVar[type[PluginOptions]] = PluginOptions
    priority: ClassVar[int] = 0

    def __init__(self, options: PluginOptions) -> None:
        self.options = options

    @classmethod
    def missing(cls) -> str:
        """What this machine lacks to run it, in one line; "" if nothing. Called before one is made."""
        return ""
