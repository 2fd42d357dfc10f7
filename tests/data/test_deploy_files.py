"""The files a platform team starts from are valid, by the schemas of those who read them."""

import os
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from milm_ray.config import load_config
from milm_ray.serve_settings import ChatSection
from milm_ray.serving.chat.build import ChatArgs
from milm_ray.serving.models import AppArgs

ROOT = Path(__file__).parents[2]
KUBERAY = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
ARGUMENTS = {
    "milm_ray.serving.models:build_app": AppArgs,
    "milm_ray.serving.chat.build:build_chat_app": ChatArgs,
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_clusters_are_valid_for_rays_launcher():
    config = read(ROOT / "cluster.yaml")
    # The launcher fills this field in before it validates.
    validate_config({**config, "cluster_synced_files": []})
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(t.get("max_workers", 0) for t in types.values()) <= config["max_workers"]

    on_premises = read(ROOT / "deploy" / "cluster-onprem.yaml")
    assert on_premises["max_workers"] == len(on_premises["provider"]["worker_ips"])
    validate_config({**prepare_config(on_premises), "cluster_synced_files": []})


def test_the_clusters_differ_only_in_where_they_run():
    """What is uploaded, how it is set up and how Ray starts is the same, paths apart."""
    cloud, own = read(ROOT / "cluster.yaml"), read(ROOT / "deploy" / "cluster-onprem.yaml")
    assert cloud["rsync_exclude"] == own["rsync_exclude"]
    for key in ("setup_commands", "worker_start_ray_commands"):
        assert [c.replace("/home/ubuntu/", "/home/ray/") for c in cloud[key]] == own[key]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/cluster-onprem.yaml"])
def test_every_node_asks_for_the_token_and_runs_jobs_with_its_environments_python(
    name: str, key: str, tmp_path: Path
):
    """A node that `ray start` makes asks for a token only where it is told to."""
    config = read(ROOT / name)
    assert [mount for mount in config["file_mounts"] if mount.endswith("/.ray/auth_token")]
    (start,) = [command for command in config[key] if "ray start" in command]
    (code,) = [mount for mount in config["file_mounts"] if mount.endswith("/milm_ray")]
    ray = tmp_path / ".venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\necho "$RAY_AUTH_MODE $PATH $*"\n')
    ray.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", start.replace(code, str(tmp_path))],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "RAY_HEAD_IP": "192.0.2.1"},
    )
    mode, path, arguments = done.stdout.split(" ", 2)
    assert mode == "token"
    assert path.startswith(f"{ray.parent}:")
    assert arguments.startswith(("start --head", "start --address=192.0.2.1:6379"))


def test_the_cloud_takes_the_nodes_as_they_are_described(monkeypatch, tmp_path: Path):
    """Ray's own code for AWS asks a simulated AWS for a node of every type."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # for the ssh key that Ray makes
    config = {**read(ROOT / "cluster.yaml"), "cluster_synced_files": []}
    with mock_aws():
        profiles = roles_of_nodes()
        ready = bootstrap_aws(prepare_config(config))
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, node in ready["available_node_types"].items():
            wanted = node["node_config"]
            assert wanted["IamInstanceProfile"]["Name"] in profiles
            made = provider.create_node(dict(wanted), {"ray-user-node-type": name}, 1)
            (instance,) = made.values()
            assert instance.instance_type == wanted["InstanceType"]


def roles_of_nodes() -> list[str]:
    """The instance profiles of deploy/aws-roles.yaml, made in the simulated AWS."""
    iam = boto3.client("iam", "us-west-2")
    template = (ROOT / "deploy" / "aws-roles.yaml").read_text(encoding="utf-8")
    # CloudFormation refuses what a YAML alias stands for.
    assert not [event for event in yaml.parse(template) if isinstance(event, yaml.AliasEvent)]
    resources = yaml.safe_load(template)["Resources"].values()
    of = [r["Properties"] for r in resources if r["Type"] == "AWS::IAM::InstanceProfile"]
    names = [properties["InstanceProfileName"] for properties in of]
    for name in names:
        iam.create_instance_profile(InstanceProfileName=name)
    return names


def serve_configs() -> list[tuple[str, str]]:
    service = read(ROOT / "deploy" / "kuberay" / "rayservice.yaml")
    return [
        ("serve_config.yaml", (ROOT / "serve_config.yaml").read_text(encoding="utf-8")),
        ("rayservice.yaml", service["spec"]["serveConfigV2"]),
    ]


@pytest.mark.parametrize(("name", "text"), serve_configs())
def test_the_served_applications_are_built_from_valid_arguments(name: str, text: str):
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert {app.import_path for app in config.applications} == set(ARGUMENTS)
    for app in config.applications:
        ARGUMENTS[app.import_path].model_validate(app.args)


def test_the_kubernetes_service_is_the_same_behind_keys():
    here, there = (yaml.safe_load(text) for _, text in serve_configs())
    expected = yaml.safe_load(yaml.safe_dump(here).replace("runs/paper", "/mnt/milm/runs/paper"))
    expected["http_options"]["host"] = "0.0.0.0"
    models, chat = expected["applications"]
    models["args"]["ingress"]["keys_file"] = chat["args"]["keys_file"] = "/mnt/milm/keys.json"
    del chat["args"]["database"]  # a database that several nodes may use, from the secret
    assert there == expected
    cluster = read(ROOT / "deploy" / "kuberay" / "rayservice.yaml")["spec"]["rayClusterConfig"]
    section = ChatSection()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        names = {variable["name"] for variable in container["env"]}
        assert names == {section.models_key_env, section.database_env}


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_the_kubernetes_clusters_fit_this_repository(path: Path):
    manifest = read(path)
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    lock = (ROOT / "requirements" / "gpu.lock").read_text(encoding="utf-8")
    assert f"ray=={cluster['rayVersion']}\n" in lock
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith(":gpu" if wants_gpu else ":cpu")
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_kubernetes_jobs_command_is_one_that_this_repository_has():
    spec = read(ROOT / "deploy" / "kuberay" / "rayjob.yaml")["spec"]
    match = re.fullmatch(r"python (jobs/\w+\.py) --config (\S+) (.*)", spec["entrypoint"])
    assert match, spec["entrypoint"]
    assert (ROOT / match[1]).is_file()
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert load_config(ROOT / match[2], match[3].split()).workspace == "/mnt/milm/runs/paper"


def test_what_a_submitted_job_uploads_is_small(tmp_path: Path):
    excludes = read(ROOT / "deploy" / "runtime_env.yaml")["excludes"]
    for name, further, limit in (("real", excludes, 5e6), ("quickstart", [], 30e6)):
        package = tmp_path / f"{name}.zip"
        create_package(
            str(ROOT),
            package,
            excludes=further,
            include_gitignore=True,
            include_parent_dir=False,
        )
        with zipfile.ZipFile(package) as archive:
            files = archive.namelist()
        assert package.stat().st_size < limit, name
        assert "jobs/pipeline.py" in files
        assert not [file for file in files if file.startswith((".git/", ".venv", "runs", "tests"))]
