"""The GitHub Action as a runner starts it, and the pre-commit hooks as pre-commit reads them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((_ROOT / "action.yml").read_text())
INSTALL, RUN = ACTION["runs"]["steps"]
HOOKS: dict[str, Any] = {
    hook["id"]: hook for hook in yaml.safe_load((_ROOT / ".pre-commit-hooks.yaml").read_text())
}


def run_action(
    folder: Path, environment: Mapping[str, str], **given: str
) -> subprocess.CompletedProcess[str]:
    """Run its script in a folder, with the inputs of a job and the ``gradscope`` on the PATH.

    ``output`` and ``summary`` of the folder are what the runner reads afterwards.
    """
    inputs = {name: spec.get("default") for name, spec in ACTION["inputs"].items()}
    inputs |= {"install": "false"} | {k.replace("_", "-"): v for k, v in given.items()}
    script, summary, output = (folder / name for name in ("run.sh", "summary", "output"))
    script.write_text(RUN["run"])
    summary.write_text("")
    output.write_text("")
    env = {
        **environment,
        "RUNNER_TEMP": str(folder),
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_OUTPUT": str(output),
        **{name: _evaluated(value, inputs) for name, value in RUN["env"].items()},
    }
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    return subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True)


def _evaluated(expression: str, inputs: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda at: inputs[at[1]], expression)
