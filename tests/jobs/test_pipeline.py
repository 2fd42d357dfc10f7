"""The whole pipeline as a user runs it: killed at several stages, resumed, submitted as a job."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
from botocore.config import Config as BotocoreConfig

from milm_ray.workspace import Workspace
from tests.cluster.cluster import ray_node, wait_for_jobs

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
SAMPLES = ROOT / "milm_ray" / "samples"
QUICKSTART = "jobs/configs/quickstart.yaml"
TINY = "{{path: milm_ray/samples/models/tiny-{0}, chat_format: {0}}}"
MODELS = ("baichuan2", "llama3")


def models(*names: str) -> str:
    """An override that leaves these of the quickstart's models."""
    return "models={" + ", ".join(f"{name}: {TINY.format(name)}" for name in names) + "}"


# The quickstart itself, cut short: every stage, two models at once, fewer steps and tokens.
SHORT = [
    "split.test_dialogues=3",
    "finetune.epochs=1",
    "finetune.save_steps=4",
    "generate.max_new_tokens=16",
    "simulate.max_rounds=2",
]
STEPS = 16  # 63 dialogues in steps of 4, one epoch
KILLED_AT = [
    r"\[1/12\] ingest \| start",
    r"finetune \w+ \| step 6/",
    r"generate \| endpoints at",
]


def pipeline(workspace: Path, kill_at: str | None = None) -> tuple[int, str]:
    """Run the pipeline; SIGKILL the driver when a line matches. Returns (exit code, output)."""
    process = subprocess.Popen(
        [
            *(sys.executable, "jobs/pipeline.py", "--config", QUICKSTART),
            *(f"workspace={workspace}", *SHORT, models(*MODELS)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if kill_at and re.search(kill_at, line):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(timeout=120), "".join(lines)


def manifests(workspace: Path) -> dict[str, str]:
    return {
        str(path.parent.relative_to(workspace)): path.read_text()
        for path in workspace.rglob("manifest.json")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace finished after three SIGKILLs, and the last run's output."""
    workspace = tmp_path_factory.mktemp("pipeline") / "run"
    before: dict[str, str] = {}
    for pattern in KILLED_AT:
        code, output = pipeline(workspace, kill_at=pattern)
        assert code == -signal.SIGKILL, output
        now = manifests(workspace)
        redone = [name for name in before if now.get(name) != before[name]]
        assert not redone, f"finished stages were redone: {redone}"
        before = now
    code, output = pipeline(workspace)
    assert code == 0, output
    now = manifests(workspace)
    assert all(now[name] == text for name, text in before.items())
    return workspace, output


def test_every_artifact_is_there_with_its_manifest(finished):
    workspace, _ = finished
    for artifact in (
        *("dialogues", "verdicts", "selection", "mi_dialogues", "train", "test", "test_rounds"),
        *(*(f"adapters/{model}" for model in MODELS), "adapters"),
        *("predictions", "sessions/simulated", "metrics"),
        *("packet", "packet_key", "codings", "study", "report"),
    ):
        manifest = json.loads((workspace / artifact / "manifest.json").read_text())
        assert manifest["made_from"]["settings"], artifact
        assert manifest["versions"]["ray"], artifact


def test_the_killed_training_went_on_from_its_checkpoint(finished):
    workspace, _ = finished
    for model in MODELS:
        log = pq.read_table(workspace / "adapters" / model / "log.parquet").to_pylist()
        steps = [row["step"] for row in log]
        assert steps == sorted(set(steps)), f"{model}: a step was logged twice: {steps}"
        assert steps[-1] == STEPS
        assert log[-1]["loss"] < log[0]["loss"]


def test_no_reply_was_asked_for_twice(finished):
    workspace, _ = finished
    keys = Counter(
        json.loads(line)["key"]
        for path in (workspace / "replies").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    assert keys
    assert max(keys.values()) == 1


def test_every_round_has_one_prediction_of_every_model_and_variant(finished):
    workspace, _ = finished
    files = sorted((workspace / "predictions").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    rounds = pq.read_table(sorted((workspace / "test_rounds").glob("*.parquet"))[0]).to_pylist()
    wanted = {
        (row["dialogue_id"], row["round_index"], model, variant)
        for row in rounds
        for model in MODELS
        for variant in ("base", "adapter")
    }
    found = [(r["dialogue_id"], r["round_index"], r["model"], r["variant"]) for r in rows]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_the_test_set_shares_no_source_with_training(finished):
    workspace, _ = finished

    def sources(artifact: str) -> set[str]:
        files = sorted((workspace / artifact).glob("*.parquet"))
        return {s for f in files for s in pq.read_table(f)["source_dialogue_id"].to_pylist()}

    assert sources("train")
    assert sources("test")
    assert not sources("train") & sources("test")


def test_the_report_is_one_page_with_its_figures(finished):
    workspace, _ = finished
    page = (workspace / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    assert not re.search(r"""(src|href)=["']https?://[^"']+\.(js|css|png|woff2?)""", page)


def test_a_finished_pipeline_is_left_alone(finished):
    workspace, _ = finished
    before = manifests(workspace)
    code, output = pipeline(workspace)
    assert code == 0, output
    assert manifests(workspace) == before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server of its own with a bucket, credentials in the environment. Yields its address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    address = f"127.0.0.1:{_free_port()}"
    host, port = address.split(":")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", port],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{address}",
        config=BotocoreConfig(retries={"total_max_attempts": 12, "mode": "standard"}),
    )
    client.create_bucket(Bucket="runs")
    client.create_bucket(Bucket="raw")
    for path in sorted((SAMPLES / "CPsyCounD" / "Data").iterdir()):
        client.upload_file(str(path), "raw", f"CPsyCounD/Data/{path.name}")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(SAMPLES / "SmileChat" / "data", "data")
    client.put_object(Bucket="raw", Key="SmileChat.tar.gz", Body=packed.getvalue())
    yield address
    server.terminate()
    server.wait(timeout=30)


@pytest.fixture
def head_node(object_store: str) -> Iterator[str]:
    """The job server of a Ray head node of its own, token authentication on as by default. Its
    processes have the object store's credentials."""
    # Makes the token in the home directory, as the README tells, unless there is one.
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    port = _free_port()
    # Sockets live under the directory, and their paths must stay short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        process = ray_node(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
                *(
                    "--port=0",
                    f"--ray-client-server-port={_free_port()}",
                    f"--temp-dir={directory}",
                ),
                *(f"--dashboard-port={port}", "--dashboard-agent-listen-port=0"),
            ],
            Path(directory, "start.log"),
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for_jobs(address)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=180)


def test_a_submitted_job_reads_from_and_writes_to_an_object_store(head_node, object_store):
    store = f"?endpoint_override={object_store}&scheme=http"
    place = f"s3://runs/quickstart{store}"
    command = [
        *(RAY, "job", "submit", "--address", head_node),
        *("--working-dir", ".", "--", sys.executable, "jobs/pipeline.py"),
        *("--config", QUICKSTART, f"workspace={place}", *SHORT),
        models("llama3"),
        f"ingest.corpora.cpsycound.path=s3://raw/CPsyCounD{store}",
        f"ingest.corpora.smilechat.path=s3://raw/SmileChat.tar.gz{store}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1600,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout.lower()
    workspace = Workspace.open(place)
    corpora = workspace.manifest("dialogues")["corpora"]
    here = {"cpsycound": "CPsyCounD/Data", "smilechat": "SmileChat/data"}
    for name, folder in here.items():
        assert corpora[name]["files"] == len(list((SAMPLES / folder).iterdir()))
    assert sum(entry["dialogues"] for entry in corpora.values()) == 102
    assert workspace.manifest("predictions")["counts"]["rows"] > 0
    assert "<html" in workspace.read_text("report", "index.html")
