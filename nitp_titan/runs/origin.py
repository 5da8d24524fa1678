"""From which checkpoint of another run a run has branched, as its resolved job says. Free of torch."""

from __future__ import annotations

from pathlib import Path

import tomli


def branched_from(run: Path) -> str:
    """Return "RUN step N", or an empty text where the run began by itself or its ``config.toml`` cannot be read."""
    try:
        table = tomli.loads((run / "config.toml").read_text(encoding="utf-8"))["checkpoint"]
        path = Path(table["branch_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    # "none" is an unset key of a resolved file.
    if path == Path("none"):
        return ""
    parent = path.parent.parent if path.parent.name == "checkpoint" else path.parent
    return f"{parent.name} {path.name.replace('-', ' ')}"
