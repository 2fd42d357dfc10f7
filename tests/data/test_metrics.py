"""The jobs' own metrics reach the port that Prometheus reads, under the dashboard's names."""

import json
import re
import subprocess
import sys
from pathlib import Path

from milm_ray.metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[2]
DRIVER = """
import time, urllib.request
import ray
from milm_ray import metrics
from milm_ray.job import start_ray
from milm_ray.llm.progress import Progress

metrics.count("milm_replies", stage="nowhere", outcome="answered")  # no session yet: no effect
start_ray(num_cpus=1, include_dashboard=False)
(node,) = ray.nodes()
progress = Progress("transcribe", 3)
progress.add(rejected=False, tokens=100, cost=0.5)
progress.add(rejected=True, tokens=10, cost=None)
metrics.gauge("milm_train_loss", 1.5, model="glm4")
ours = []
for _ in range(90):
    time.sleep(1)
    try:
        url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        continue
    ours = [line for line in lines if line.startswith("ray_milm_")]
    if len(ours) >= 5:  # all that was recorded; not all of it need come at a time
        break
print("\\n".join(ours))
"""


def test_what_was_counted_is_exported():
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = {}
    for line in done.stdout.splitlines():
        name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
        tags = dict(re.findall(r'(stage|outcome|model)="([^"]*)"', labels))
        found[name, *sorted(tags.values())] = float(value)
    assert found == {
        ("ray_milm_replies_total", "answered", "transcribe"): 1,
        ("ray_milm_replies_total", "rejected", "transcribe"): 1,
        ("ray_milm_tokens_total", "transcribe"): 110,
        ("ray_milm_cost_usd_total", "transcribe"): 0.5,
        ("ray_milm_train_loss", "glm4"): 1.5,
    }


def test_the_dashboard_draws_every_metric_and_no_other():
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    drawn = {name for text in expressions for name in re.findall(r"ray_milm_\w+", text)}
    assert drawn == {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{n}" for n in GAUGES}
    tags = {n: set(t) for known in (COUNTERS, GAUGES) for n, (_, t) in known.items()}
    for text in expressions:
        (grouped,) = re.findall(r"by \(([\w, ]+)\)", text)
        (name,) = re.findall(r"ray_(milm_\w+?)(?:_total)?\{", text)
        assert set(grouped.split(", ")) <= tags[name], text
