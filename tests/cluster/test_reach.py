"""A workspace that a node cannot use is said before any work starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.cluster.cluster import ROOT, Job, Nodes

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(900)]


def test_a_node_that_does_not_see_the_workspace_is_named(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add("a")
    # This node's processes have another working directory, so that a path through it means another
    # place to them, as a path means another disk on another machine.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    nodes.add("b")
    monkeypatch.chdir(ROOT)
    home = f"/proc/self/cwd/{os.path.relpath(tmp_path, ROOT)}/run"
    arguments = ("--config", "jobs/configs/quickstart.yaml", f"workspace={home}")
    with Job(nodes, "ingest", *arguments) as job:
        output = job.end(code=2)
    named = re.findall(r"node [\d.]+ \(Ray's id (\w+)\) does not see", output)
    assert named == [nodes.id("b")[:12]], output
    assert "mounted on every node (NFS)" in output
    assert "Traceback" not in output
    assert "ingest | start" not in output
    assert not list((tmp_path / "run").iterdir()), "the check left something behind"
    nodes.kill("b")
    with Job(nodes, "ingest", *arguments) as job:
        job.end()
