"""What neighbouring stages share is opened once for them, and closed whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from milm_ray.dataset import transcribe
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import Plan, Stage, main
from tests.transcription_job import workspace_with_dialogues


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"workspace: {tmp_path / 'ws'}\n", encoding="utf-8")
    return str(path)


def stages(events: list[str], failing: str = "") -> list[Stage]:
    @contextmanager
    def engines() -> Iterator[None]:
        events.append("open")
        try:
            yield
        finally:
            events.append("close")

    def stage(name: str, shares: bool) -> Stage:
        def run(*_: object) -> dict[str, dict[str, int]]:
            events.append(name)
            if name == failing:
                raise UserError("broken")
            return {"counts": {}}

        around = engines if shares else None
        return Stage(name, lambda *_: Plan(), run, uses_ray=False, around=around)

    return [stage("a", False), stage("b", True), stage("c", True), stage("d", False)]


def test_neighbours_share_and_others_do_not(config):
    events: list[str] = []
    assert main("d", stages(events), ["--config", config]) == 0
    assert events == ["a", "open", "b", "c", "close", "d"]


def test_a_failing_stage_closes_what_it_shared(config):
    events: list[str] = []
    assert main("d", stages(events, failing="b"), ["--config", config]) == 1
    assert events == ["a", "open", "b", "close"]


def test_nothing_is_opened_for_a_plan(config):
    events: list[str] = []
    assert main("d", stages(events), ["--config", config, "--dry-run"]) == 0
    assert events == []


def planning(name: str, events: list[str], plan: Plan | UserError) -> Stage:
    def planned(*_: object) -> Plan:
        if isinstance(plan, UserError):
            raise plan
        return plan

    def run(*_: object) -> dict[str, dict[str, int]]:
        events.append(name)
        return {"counts": {}}

    return Stage(name, planned, run, uses_ray=False)


def test_a_plan_that_waits_for_a_stage_ahead_stops_nothing(config, caplog):
    events: list[str] = []
    ahead = planning("ingest", events, Plan())
    behind = planning("transcribe", events, UserError("dialogues/ is not in the workspace"))
    with caplog.at_level("INFO"):
        assert main("d", [ahead, behind], ["--config", config]) == 0
    assert events == ["ingest", "transcribe"]
    assert (
        "plan transcribe | not known before the stages ahead of it ran: dialogues/" in caplog.text
    )


@pytest.mark.parametrize("wrong", [UserError("no dialogues/"), ConfigError(["models: none"])])
def test_what_no_stage_ahead_will_make_stops_before_anything_runs(config, wrong):
    events: list[str] = []
    ahead = planning("ingest", events, Plan(done=not isinstance(wrong, ConfigError)))
    behind = planning("transcribe", events, wrong)
    assert main("d", [ahead, behind], ["--config", config]) == wrong.exit_code
    assert main("d", [behind], ["--config", config]) == wrong.exit_code
    assert events == []


def test_transcribe_waits_for_an_ingest_that_was_interrupted(tmp_path, capsys):
    """It has cleared `dialogues/`; what was made of the older ones remains."""
    workspace = workspace_with_dialogues(tmp_path)
    workspace.clear("dialogues")
    events: list[str] = []
    path = tmp_path / "c.yaml"
    path.write_text(f"workspace: {workspace.root}\n", encoding="utf-8")
    stages = [planning("ingest", events, Plan()), transcribe.STAGE]
    assert main("d", stages, ["--config", str(path)]) == 1
    assert events == ["ingest"]
    assert main("d", stages[1:], ["--config", str(path)]) == 1
    assert capsys.readouterr().err.count("run the job that makes it first (jobs/ingest.py)") == 2
