"""The files a platform team starts from are valid, by the schemas of those who read them."""

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from milm_ray.config import load_config
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


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/cluster-onprem.yaml"])
def test_no_node_of_the_clusters_answers_without_the_token(name: str):
    """A node that `ray start` makes asks for a token only where it is told to."""
    config = read(ROOT / name)
    assert [mount for mount in config["file_mounts"] if mount.endswith("/.ray/auth_token")]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert starts
        assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)


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
    text = yaml.safe_dump(here).replace("runs/paper", "/mnt/milm/runs/paper")
    expected = yaml.safe_load(text.replace("sqlite:////mnt", "sqlite:///mnt"))
    expected["http_options"]["host"] = "0.0.0.0"
    models, chat = expected["applications"]
    models["args"]["ingress"]["keys_file"] = chat["args"]["keys_file"] = "/mnt/milm/keys.json"
    chat["args"]["database"] = "sqlite:////mnt/milm/runs/paper/chat/sessions.sqlite3"
    assert there == expected


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
    entrypoint = read(ROOT / "deploy" / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"]
    match = re.fullmatch(r"python (jobs/\w+\.py) --config (\S+) (.*)", entrypoint)
    assert match, entrypoint
    assert (ROOT / match[1]).is_file()
    environment = {"CORPORA": "/data"}
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
