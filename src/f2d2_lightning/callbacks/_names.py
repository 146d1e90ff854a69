"""Names of what is logged where a trainer has several callbacks of one kind."""

from __future__ import annotations

import lightning as L


def network_name(trainer: L.Trainer, kind: type[L.Callback], flow_map: str | None) -> str:
    """``"net/"`` for a callback on the network ``net`` where others of its kind are on others, else nothing.

    Lightning averages what callbacks log under one name.
    """
    networks = {c.flow_map for c in trainer.callbacks if isinstance(c, kind)}  # type: ignore[attr-defined]
    return f"{flow_map}/" if flow_map is not None and len(networks) > 1 else ""
