"""The data stages on 1, 10 and 100 times the samples' 102 dialogues, for the capacity plan.

    python benchmarks/capacity_runs.py 1 10 100        # into docs/scale.json

Runs ingest, curate, transcribe and split against tests/llm_server.py as the teacher and keeps what
each took: CPU seconds of all processes of the run (the machine may do other work), wall time, bytes
written, calls, and the most memory that the driver and the largest worker had for themselves.
`benchmarks/capacity.py` sets the figures beside its model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.capacity import RUNS, kept  # noqa: E402

SAMPLES = 102


class Meter:
    """CPU seconds of this process and its descendants, and their memory at its most."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self._seen: dict[tuple[int, float], float] = {}
        self._lock = threading.Lock()
        self.driver = self.worker = 0
        threading.Thread(target=self._tick, daemon=True).start()

    def cpu_s(self) -> float:
        self._look()
        with self._lock:
            return sum(self._seen.values())

    def _tick(self) -> None:
        while True:
            self._look()
            time.sleep(0.3)

    def _look(self) -> None:
        with self._lock:
            self.driver = max(self.driver, _private(self._me))
            for process in [self._me, *self._me.children(recursive=True)]:
                try:
                    command = " ".join(process.cmdline())
                    # The simulated teacher is not part of the run.
                    if "llm_server.py" in command:
                        continue
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
                    if command.startswith("ray::"):
                        self.worker = max(self.worker, _private(process))
                except psutil.Error:
                    continue


def _private(process: psutil.Process) -> int:
    """Bytes that a process holds for itself: without libraries and without Ray's object store."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def measure(scale: int, meter: Meter, folder: Path) -> dict[str, Any]:
    """Ingest, curate, transcribe and split of so many times the samples' dialogues."""
    from milm_ray.config import Config
    from milm_ray.corpora.ingest import STAGE as INGEST
    from milm_ray.dataset.curate import STAGE as CURATE
    from milm_ray.dataset.split import STAGE as SPLIT
    from milm_ray.dataset.transcribe import STAGE as TRANSCRIBE
    from milm_ray.job import connect
    from milm_ray.workspace import Workspace
    from tests.llm_server_process import KEY, ServerProcess

    raw, home = folder / "raw", folder / "run"
    corpus(raw, SAMPLES * scale)
    with ServerProcess(folder / "asked.jsonl", latency=0.5, jitter=0.25) as server:
        llm = {"model": "teacher", "base_url": server.url, "api_key_env": "CAPACITY_KEY"}
        config = Config.model_validate(
            {
                "workspace": str(home),
                "ray": {"num_cpus": 2},
                "ingest": {"corpora": {"smilechat": {"path": str(raw)}}},
                "judge": {**llm, "concurrency": 64},
                "curate": {"select": 1},
                "teacher": {**llm, "concurrency": 64},
            }
        )
        os.environ["CAPACITY_KEY"] = KEY
        connect(config)
        workspace = Workspace.open(str(home))
        stages: dict[str, dict[str, float]] = {}
        for stage in (INGEST, CURATE, TRANSCRIBE, SPLIT):
            before, began, written = meter.cpu_s(), time.time(), size_of(home)
            meter.driver = meter.worker = 0
            manifest = stage.run(config, workspace)
            stages[stage.name] = {
                "cpu_s": round(meter.cpu_s() - before, 2),
                "wall_s": round(time.time() - began, 2),
                "written_mib": round((size_of(home) - written) / 2**20, 2),
                "driver_mib": round(meter.driver / 2**20, 1),
                "worker_mib": round(meter.worker / 2**20, 1),
                "calls": manifest.get("usage", {}).get("replies", 0),
            }
            print(f"{SAMPLES * scale:,} dialogues, {stage.name}: {stages[stage.name]}", flush=True)
    return {"dialogues": SAMPLES * scale, "stages": stages}


def keep(run: dict[str, Any]) -> None:
    """Put a run in the place of an earlier one of its size."""
    runs = [*(r for r in kept() if r["dialogues"] != run["dialogues"]), run]
    runs.sort(key=lambda r: r["dialogues"])
    RUNS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def corpus(folder: Path, dialogues: int) -> None:
    """SmileChat's layout: turns of the samples put together anew, so that no two are alike."""
    pools: dict[str, list[str]] = {"client": [], "counselor": []}
    for file in sorted((ROOT / "milm_ray/samples/SmileChat/data").glob("*.json")):
        for turn in json.loads(file.read_text(encoding="utf-8")):
            pools[turn["role"]].append(turn["content"])
    pick = random.Random(7)
    folder.mkdir(parents=True)
    for number in range(dialogues):
        turns = [
            {"role": role, "content": pick.choice(pools[role])}
            for _ in range(pick.randint(7, 12))
            for role in ("client", "counselor")
        ]
        turns[0]["content"] += f"（{number}）"
        (folder / f"{number}.json").write_text(
            json.dumps(turns, ensure_ascii=False), encoding="utf-8"
        )


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scales", type=int, nargs="+", metavar="SCALE")
    first, *further = parser.parse_args().scales
    with tempfile.TemporaryDirectory() as folder:
        keep(measure(first, Meter(), Path(folder)))
    if further:  # in a process, and a Ray session, of their own
        subprocess.run([sys.executable, __file__, *map(str, further)], check=True)


if __name__ == "__main__":
    main()
