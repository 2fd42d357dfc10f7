"""The Kubernetes manifests hold what KubeRay's own definitions allow, and nothing else.

`kuberay_schema.json` is made by `kuberay_schema.py` from KubeRay's CustomResourceDefinitions, of
the oldest version that the manifests are for and of the newest.
"""

import json
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

MANIFESTS = sorted((Path(__file__).parents[2] / "deploy" / "kuberay").glob("*.yaml"))
MADE = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text(encoding="utf-8"))
VERSIONS = MADE["versions"]
HEAD = ("spec", "headGroupSpec", "template", "spec", "containers", 0)
GPU = ("spec", "workerGroupSpecs", 1)


class Strict(yaml.SafeLoader):
    """YAML in which a field may stand once, as for the API server's strict validation."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a field twice, {node.start_mark}"
        return super().construct_mapping(node, deep=deep)


def read(path: Path) -> dict[str, Any]:
    manifest = yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)
    return json.loads(json.dumps(manifest))  # what YAML's anchors share, each for itself


@cache
def validator(version: str, kind: str) -> Draft202012Validator:
    return Draft202012Validator({**MADE["schemas"][version][kind], "$defs": MADE["$defs"]})


def faults(manifest: dict[str, Any], version: str) -> list[str]:
    """What the definitions of a KubeRay version do not allow, each with its place."""
    found = validator(version, manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_manifests_are_valid(path: Path, version: str):
    assert faults(read(path), version) == []


def test_every_kind_of_resource_has_a_manifest():
    assert sorted(read(path)["kind"] for path in MANIFESTS) == sorted(MADE["schemas"][VERSIONS[0]])


def at(manifest: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        manifest = manifest[step]
    return manifest


@pytest.mark.parametrize(
    ("place", "field", "value", "says"),
    [
        # a typing mistake in a name, at every depth
        (("spec",), "enableIntreeAutoscaling", True, "'enableIntreeAutoscaling' was unexpected"),
        (("spec", "autoscalerOptions"), "idleTimeoutSecond", 60, "was unexpected"),
        (HEAD, "volumeMount", [], "'volumeMount' was unexpected"),
        ((*HEAD, "volumeMounts", 0), "mountpath", "/mnt", "'mountpath' was unexpected"),
        (("metadata",), "label", {}, "'label' was unexpected"),
        # a value of another type
        (GPU, "replicas", "3", "'3' is not of type 'integer'"),
        (GPU, "rayStartParams", {"num-cpus": 0}, "0 is not of type 'string'"),
        ((*HEAD, "ports", 0), "containerPort", "8265", "'8265' is not of type 'integer'"),
        ((*HEAD, "resources", "limits"), "memory", "16 GB", "'16 GB' does not match"),
        # a value that is none of those allowed
        (("spec", "autoscalerOptions"), "upscalingMode", "Fast", "'Fast' is not one of"),
        (("spec", "authOptions"), "mode", "tokens", "'tokens' is not one of"),
        ((), "apiVersion", "ray.io/v2", "'ray.io/v2' is not one of"),
        # something left out
        (GPU, "template", None, "'template' is a required property"),
        (GPU, "groupName", None, "'groupName' is a required property"),
        (HEAD, "name", None, "'name' is a required property"),
        (("spec",), "headGroupSpec", None, "'headGroupSpec' is a required property"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(
    place: tuple[str | int, ...], field: str, value: Any, says: str
):
    manifest = read(next(path for path in MANIFESTS if path.stem == "raycluster"))
    if value is None:
        del at(manifest, place)[field]
    else:
        at(manifest, place)[field] = value
    for version in VERSIONS:
        (fault,) = faults(manifest, version)
        assert says in fault


def test_a_field_given_twice_is_found(tmp_path: Path):
    file = tmp_path / "twice.yaml"
    file.write_text("kind: RayJob\nspec: {a: 1}\nkind: RayJob\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="a field twice"):
        read(file)
