"""What `dl-inference-core check` does beside loading: the files of TLS are read, handlers are run on samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dl_inference_core import certificates
from dl_inference_core.config import ClientTls, Config, ServerTls
from dl_inference_core.errors import ConfigError, InferenceError

if TYPE_CHECKING:
    from dl_inference_core.app import App


async def check(app: App, config: Config) -> list[dict[str, Any]]:
    """Load all that `app`, made of `config`, would serve. Returns rows as of `App.describe`, one for each TLS section,
    and one for the codecs of models.

    Raises:
        ConfigError, PluginError: as `App.load`.
    """
    await app.load()
    rehearsed = await _rehearse(app)
    rows = [*app.describe(), *_tls(config)]
    if app.repository is not None:
        name, why = app.codecs
        rows.append({"kind": "codec", "name": name, "ok": True, "detail": why})
    for row in rows:
        ok, note = rehearsed.get(row["name"], (True, "")) if row["kind"] == "model" and row["ok"] else (True, "")
        if not ok:
            row.update(ok=False, detail=note)
        elif note:
            row["detail"] += f"; {note}"
    return rows


async def _rehearse(app: App) -> dict[str, tuple[bool, str]]:
    """By model and version: whether the handler answers samples, and what there is to say of it."""
    results: dict[str, tuple[bool, str]] = {}
    for model in app.repository.models.values() if app.repository is not None else ():
        from dl_inference_core.node.loading import in_words  # a gateway imports nothing of a node's

        for number, version in model.loaded.items():
            name = f"{model.name}/{number}"
            try:
                results[name] = True, await version.rehearse()
            except InferenceError as error:
                results[name] = False, in_words(error)
    return results


def _tls(config: Config) -> list[dict[str, Any]]:
    sections: dict[str, ServerTls | ClientTls | None] = {
        "[tls]": config.tls,
        "[gateway.tls]": config.gateway.tls,
        "[join.tls]": config.join.tls if config.join is not None else None,
    }
    rows = []
    for name, section in sections.items():
        if section is None:
            continue
        detail, ok = "its files can be used", True
        try:
            certificates.read(section)
        except ConfigError as error:
            detail, ok = str(error), False
        rows.append({"kind": "tls", "name": name, "ok": ok, "detail": detail})
    return rows
