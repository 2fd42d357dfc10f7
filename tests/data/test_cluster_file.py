"""cluster.yaml is valid for the Ray cluster launcher, by Ray's own schema."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import validate_config

ROOT = Path(__file__).parents[2]


def test_cluster_yaml_is_valid():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    # The launcher fills this field in before it validates.
    validate_config({**config, "cluster_synced_files": []})
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(t.get("max_workers", 0) for t in types.values()) <= config["max_workers"]
