"""What MLflow's page of an experiment shows first: tags of the experiment that its web pages read.

A saved view ("Views" on the page of runs) holds filter, order and columns. MLflow keeps it in a tag; a version that
does not know the tag shows its own default. `benchmarks/mlflow_ui.py` looks at it in a browser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

VIEW = "lanewise"
"""The saved view's key: `.../runs?viewStateShareKey=lanewise` opens it."""

MOST_AXES = 8


def page_tags(plain: Mapping[str, Any]) -> dict[str, str]:
    """Description and saved view of a sweep's experiment. plain: sweep.json."""
    made = int(datetime.fromisoformat(plain["started_at"]).timestamp() * 1000)
    envelope = {"name": "finished configs, best first", "createdAt": made, "updatedAt": made}
    state = {
        "searchFilter": "tags.kind = 'config' and tags.stop_reason = 'finished'",
        "orderByKey": f"metrics.`final/{plain['metric']}`",
        "orderByAsc": plain["mode"] == "min",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": columns(plain),
    }
    return {
        "mlflow.note.content": str(plain["doc"])[:5000],
        f"mlflow.sharedViewState.{VIEW}": json.dumps({**envelope, "state": json.dumps(state)}),
    }


def columns(plain: Mapping[str, Any]) -> list[str]:
    """Columns worth sorting by: result, its spread, seeds, what was varied, what it cost."""
    metric = plain["metric"]
    shown = [f"metrics.`{name}`" for name in (f"final/{metric}", f"final/{metric}_sd", "seeds", "device_seconds")]
    return [*shown, *(f"params.`{name}`" for name in varied(plain["space"])[:MOST_AXES])]


def varied(space: list[Mapping[str, Any]]) -> list[str]:
    """Params that the axes of a plain space make: the field an axis sets; for named arms the axis itself."""
    return list(dict.fromkeys(axis.get("sets") or axis["name"] for axis in space))
