"""The contract of every job's command line: plans, exit codes, and nothing written too early."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = "jobs/configs/quickstart.yaml"
STAGES = ["ingest", "curate", "transcribe", "split", "finetune", "generate", "simulate", "score"]
JOBS = [*STAGES, "miti", "report"]


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", [*JOBS, "pipeline"])
def test_a_wrong_configuration_is_refused_whole_before_anything_is_written(name, tmp_path):
    workspace = tmp_path / "run"
    done = job(name, "--config", QUICKSTART, f"workspace={workspace}", "seed=x", "splt.n=1")
    assert done.returncode == 2, done.stderr
    assert "2 problem(s)" in done.stderr
    assert "seed: " in done.stderr
    assert "splt: unknown key; did you mean split?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not workspace.exists()


def test_a_missing_corpus_and_an_unknown_key_are_named_together(tmp_path):
    done = job(
        "pipeline",
        *("--config", QUICKSTART, f"workspace={tmp_path / 'run'}"),
        *("ingest.corpora.efaqa.path=/no/such/corpus", "models.glm4.path=/no/such/model"),
        "curate.per_corpu=3",
    )
    assert done.returncode == 2
    for named in ("/no/such/corpus", "/no/such/model", "did you mean per_corpus?"):
        assert named in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_every_stages_plan_and_writes_nothing(tmp_path):
    done = job("pipeline", "--config", QUICKSTART, f"workspace={tmp_path / 'run'}", "--dry-run")
    assert done.returncode == 0, done.stderr
    for name in [*STAGES, "packet", "code", "study", "report"]:
        assert f"plan {name} | " in done.stdout
    assert "dry run: nothing was done" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_stage_without_its_input_names_the_job_that_makes_it(tmp_path):
    done = job("split", "--config", QUICKSTART, f"workspace={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "mi_dialogues/ is not in the workspace" in done.stderr
    assert "jobs/transcribe.py" in done.stderr
    assert "Traceback" not in done.stderr
