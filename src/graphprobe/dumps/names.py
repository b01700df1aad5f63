"""What the files of a dump directory are called."""

from __future__ import annotations

ENVIRONMENT = "AD_DUMP_GRAPHS_DIR"  # AutoDeploy's variable
MANIFEST, INDEX, RUN = "graphprobe-dumps.json", "index.html", "run.json"
