"""What neighbouring stages share is opened once for them, and closed whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from milm_ray.errors import UserError
from milm_ray.job import Plan, Stage, main


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
