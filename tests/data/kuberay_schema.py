"""Make tests/data/kuberay_schema.json: what fields KubeRay's resources have, and of what types.

    git clone https://github.com/ray-project/kuberay
    python tests/data/kuberay_schema.py kuberay v1.6.0 v1.7.0

Reads the CustomResourceDefinitions of those versions and keeps their structure as JSON Schema:
names of fields, types, enumerations, limits and what is required. Descriptions are left out, and so
are the rules in CEL, which only an API server evaluates. Equal parts, such as the pod of the head
and of the workers, are written once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

TARGET = Path(__file__).with_suffix(".json")
KINDS = ("rayclusters", "rayjobs", "rayservices")
CRD = "ray-operator/config/crd/bases/ray.io_{}.yaml"
_KEPT = (
    "enum",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "pattern",
)
_WORTH_SHARING = 60  # characters; below, a reference is as long as what it refers to

Schema = dict[str, Any]


def structure(node: Schema) -> Schema:
    """JSON Schema of one node of a CRD's schema, strict as the API server's field validation."""
    kept = {key: node[key] for key in _KEPT if key in node}
    if node.get("x-kubernetes-int-or-string"):
        return {**kept, "type": ["integer", "string"]}
    kind = node.get("type")
    if kind:
        kept["type"] = [kind, "null"] if node.get("nullable") else kind
    if kind == "array":
        kept["items"] = structure(node["items"])
    if kind != "object":
        return kept
    fields = node.get("properties", {})
    if fields:
        kept["properties"] = {name: structure(field) for name, field in sorted(fields.items())}
    # The API server fills in defaults before it looks for what is missing.
    if needed := [name for name in node.get("required", []) if "default" not in fields[name]]:
        kept["required"] = sorted(needed)
    if "additionalProperties" in node:
        kept["additionalProperties"] = structure(node["additionalProperties"])
    elif not node.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def resource(definition: Schema) -> Schema:
    """The schema of what a user writes: no status, and the metadata that every resource has."""
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    fields = version["schema"]["openAPIV3Schema"]["properties"]
    spec = structure(fields["spec"])
    text = {"type": "string"}
    texts = {"type": "object", "additionalProperties": text}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"enum": [f"{definition['spec']['group']}/v1"]},
            "kind": {"enum": [definition["spec"]["names"]["kind"]]},
            "metadata": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "properties": {
                    "name": text,
                    "namespace": text,
                    "labels": texts,
                    "annotations": texts,
                },
            },
            "spec": spec,
        },
    }


class Shared:
    """Parts that occur more than once, each under a name of its own."""

    def __init__(self, schemas: list[Schema]) -> None:
        self._times: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        self.definitions: dict[str, Schema] = {}
        for schema in schemas:
            self._count(schema)

    def _count(self, node: Any) -> None:
        for child in _children(node):
            text = _text(child)
            self._times[text] += 1
            if self._times[text] == 1:
                self._count(child)

    def shortened(self, node: Schema) -> Schema:
        """The same schema with references in place of its shared parts."""
        short = dict(node)
        if "properties" in node:
            short["properties"] = {k: self._reference(v) for k, v in node["properties"].items()}
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), dict):
                short[key] = self._reference(node[key])
        return short

    def _reference(self, node: Schema) -> Schema:
        text = _text(node)
        if self._times[text] < 2 or len(text) < _WORTH_SHARING:
            return self.shortened(node)
        if text not in self._names:
            self._names[text] = name = f"{len(self._names)}"
            self.definitions[name] = {}
            self.definitions[name] = self.shortened(node)
        return {"$ref": f"#/$defs/{self._names[text]}"}


def _children(node: Schema) -> list[Schema]:
    inner = [
        node.get("items"),
        node.get("additionalProperties"),
        *node.get("properties", {}).values(),
    ]
    return [child for child in inner if isinstance(child, dict)]


def _text(node: Schema) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"))


def definitions(repository: Path, version: str) -> dict[str, Schema]:
    """Kind to CustomResourceDefinition at a tag of a clone of KubeRay."""
    found = {}
    for kind in KINDS:
        command = ["git", "-C", str(repository), "show", f"{version}:{CRD.format(kind)}"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        definition = yaml.load(text, Loader=yaml.CSafeLoader)
        found[definition["spec"]["names"]["kind"]] = definition
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", type=Path, help="a clone of KubeRay")
    parser.add_argument("versions", nargs="+", help="tags, as in v1.6.0")
    options = parser.parse_args()
    schemas = {
        version: {k: resource(d) for k, d in definitions(options.repository, version).items()}
        for version in options.versions
    }
    shared = Shared([schema for kinds in schemas.values() for schema in kinds.values()])
    made = {
        "made_by": "tests/data/kuberay_schema.py",
        "source": "https://github.com/ray-project/kuberay, " + CRD.format("*"),
        "versions": options.versions,
        "licence": "Apache-2.0",
        "schemas": {
            version: {kind: shared.shortened(schema) for kind, schema in kinds.items()}
            for version, kinds in schemas.items()
        },
        "$defs": shared.definitions,
    }
    for part in shared.definitions.values():
        Draft202012Validator.check_schema(part)
    TARGET.write_text(json.dumps(made, sort_keys=True, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
