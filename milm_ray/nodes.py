"""The cluster's nodes: whether all of them see the workspace, and which of them must do what."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from milm_ray.errors import EXIT_USAGE, UserError
from milm_ray.workspace import Workspace

log = logging.getLogger("milm_ray")

# A node that joined just now has to unpack the job's files before it runs its first task.
_PROBE_TIMEOUT_S = 120.0
# Goes to the node that runs the cluster's control: what is lost with it is lost anyway.
ON_HEAD: Mapping[str, float] = {"node:__internal_head__": 0.001}


class Unreachable(UserError):
    """Nodes of the cluster cannot use the workspace."""

    exit_code = EXIT_USAGE


def this_node() -> dict[str, str]:
    """A label selector: only the node of this process."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def check_reach(workspace: Workspace) -> None:
    """Make sure that every node reads what this one writes to the workspace, and can write there.

    A file with a token is written here, read by a task on every node, and answered with a file of
    its own. Does nothing on a cluster of one node. Nodes that join later are not checked.
    Raises Unreachable, which names the nodes that cannot.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    token = uuid.uuid4().hex
    folder = f".reach-{token}"
    probe: Any = ray.remote(num_cpus=0, max_retries=0)(_probe)
    workspace.write_text(token, folder, "driver")
    try:
        asked = {
            probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(workspace.uri, folder, token, node): node
            for node in nodes
        }
        answered, silent = ray.wait(
            list(asked), num_returns=len(asked), timeout=_PROBE_TIMEOUT_S, fetch_local=False
        )
        problems = [
            f"node {nodes[asked[ref]]} (Ray's id {asked[ref][:12]}) {problem}"
            for ref in answered
            if (problem := _answer(ref, nodes[asked[ref]]))
        ]
        for ref in silent:
            ray.cancel(ref, force=True)
            log.warning("node %s did not say whether it sees the workspace", nodes[asked[ref]])
    finally:
        workspace.clear(folder)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in sorted(problems))
        raise Unreachable(
            f"not every node reaches the workspace {workspace.uri}:{listed}", _fix(workspace)
        )


def _fix(workspace: Workspace) -> str:
    if "://" in workspace.uri:
        return "give these nodes the store's credentials and a route to it"
    return (
        "set workspace to a path that is mounted on every node (NFS) or to a URI such as "
        "s3://bucket/run"
    )


def _answer(ref: Any, address: str) -> str:
    """A probe's problem; a node that is lost meanwhile has none."""
    import ray

    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        log.warning("node %s was lost: %s", address, type(error).__name__)
        return ""


def _probe(uri: str, folder: str, token: str, node: str) -> str:
    """On a node: what keeps it from using the workspace, or nothing."""
    try:
        place = Workspace.open(uri)
        if not place.exists(folder, "driver"):
            return "does not see what the driver has written there"
        if place.read_text(folder, "driver") != token:
            return "reads something else than the driver has written there"
        place.write_text(token, folder, node)
    except (UserError, OSError) as error:
        return " ".join(str(error).split())
    return ""
