"""The capacity plan agrees with the runs that it was made from, and behaves as a plan must."""

import json

import pytest

from benchmarks import capacity

RUNS = json.loads(capacity.RUNS.read_text(encoding="utf-8"))


def total(dialogues: int, gpus: int, **changed: float) -> tuple[float, float]:
    """Seconds and USD."""
    stages = capacity.plan(dialogues, gpus, capacity.Assumed(**changed))
    return sum(stage.wall_s for stage in stages), sum(stage.usd for stage in stages)


@pytest.mark.parametrize("stage", list(capacity.DATA))
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['dialogues']}")
def test_what_was_measured_is_what_is_predicted(run: dict, stage: str) -> None:
    measured = run["stages"][stage]["cpu_s"]
    # Seconds of a start-up vary more than those of the work.
    assert capacity.cpu_seconds(stage, run["dialogues"]) == pytest.approx(measured, rel=0.3, abs=4)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['dialogues']}")
def test_the_drivers_memory_grows_as_predicted_and_no_workers_does(run: dict) -> None:
    held = run["stages"]["split"]["driver_mib"]  # the last stage: what the others held is in it
    assert capacity.driver_mib(run["dialogues"]) == pytest.approx(held, rel=0.3)
    assert all(stage["worker_mib"] < 200 for stage in run["stages"].values())


def test_more_dialogues_take_longer_and_more_gpus_never_do() -> None:
    sizes = (2_040, 20_400, 1_000_000)
    for gpus in (1, 3, 8, 64):
        times, money = zip(*(total(size, gpus) for size in sizes), strict=True)
        assert list(times) == sorted(times)
        assert list(money) == sorted(money)
    for size in sizes:
        times = [total(size, gpus)[0] for gpus in (1, 2, 3, 6, 8, 16, 64)]
        assert times == sorted(times, reverse=True)


def test_the_teacher_is_what_a_run_waits_for_until_more_calls_are_in_flight() -> None:
    def slowest(**changed: float) -> capacity.Stage:
        stages = capacity.plan(1_000_000, 64, capacity.Assumed(**changed))
        return max(stages, key=lambda stage: stage.wall_s)

    assert (slowest().name, slowest().bound_by) == ("transcribe", "concurrency")
    assert slowest(teacher_concurrency=4096).bound_by == "tokens/min"
    wide = slowest(teacher_concurrency=4096, teacher_tokens_per_minute=1e8)
    assert wide.name == "finetune"
