"""What a repository knows of each model and of each of its versions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dl_inference_core.config import NamedModel
from dl_inference_core.node.loading import ModelConfig
from dl_inference_core.node.model import ServedModel, State, VersionStatus
from dl_inference_core.node.scanning import Fingerprint
from dl_inference_core.node.version import LoadedVersion


@dataclass(slots=True, kw_only=True, eq=False)
class VersionState:
    """What is known of one version's folder.

    Attributes:
        content: of its files, once two looks agreed; None if two looks have not found them.
        tried: the content that `error`, or else `loaded`, came of; None if neither is there.
        loaded: what requests are answered with; may be of an older content.
    """

    folder: Path
    content: Fingerprint | None
    tried: Fingerprint | None = None
    error: str = ""
    loading: bool = False
    loaded: LoadedVersion | None = None

    @property
    def due(self) -> bool:
        """Whether there are files that nobody has tried to load."""
        return self.content is not None and self.tried != self.content and not self.loading

    def status(self, refusal: str) -> VersionStatus | None:
        """What there is to say of it, if anything; `refusal` is why nothing of its model may be loaded now."""
        error = refusal if refusal and self.due else self.error
        if self.loaded is not None:
            return VersionStatus(state=State.AVAILABLE, error=error)
        if self.loading:
            return VersionStatus(state=State.LOADING)
        return VersionStatus(state=State.FAILED, error=error) if error else None


@dataclass(slots=True, kw_only=True, eq=False)
class ModelState:
    """What is known of one model's folder.

    Attributes:
        config: the last `model.toml` that could be taken.
        refusal: why the present one cannot, or the model not at all; nothing is loaded until this is mended.
        labels: the version that each label leads to; as `config` says, once that has loaded.
        loads: what is being loaded.
        reported: the labels that were last said to lead nowhere.
        unloading: how many copies of a version are finishing what they were asked.
    """

    served: ServedModel
    named: NamedModel
    config: ModelConfig = field(default_factory=ModelConfig)
    refusal: str = ""
    labels: dict[str, int] = field(default_factory=dict)
    versions: dict[int, VersionState] = field(default_factory=dict)
    loads: set[asyncio.Task[None]] = field(default_factory=set)
    reported: Mapping[str, int] = field(default_factory=dict)
    unloading: Counter[int] = field(default_factory=Counter)

    def wanted(self) -> dict[int, VersionState]:
        """The versions that are there and that the policy has, newest first. Of "newest" that is all of them."""
        policy = self.config.versions
        return {
            number: version
            for number, version in sorted(self.versions.items(), reverse=True)
            if version.content is not None and (not isinstance(policy, tuple) or number in policy)
        }
