"""What a run shares with the one before it, and workers that wait for each other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from torch import distributed

from milm_ray.config import Config
from milm_ray.errors import UserError
from milm_ray.finetune import launch, worker

TINY = Path(__file__).parents[2] / "milm_ray/samples/models/tiny-glm4"


def settings(**finetune):
    entry = {"path": str(TINY), "chat_format": "glm4"}
    return launch._settings(Config(models={"glm4": entry}, finetune=finetune), "glm4")


def test_what_is_advised_where_memory_runs_out_keeps_what_is_done():
    smaller = settings(pack_tokens=1024, gradient_checkpointing=True, gpus_per_worker=0.5)
    assert smaller == settings()
    assert settings(learning_rate=1e-5) != settings()


@pytest.mark.usefixtures("one_process")
def test_workers_wait_longer_than_a_collective_operation_may_take(monkeypatch):
    monkeypatch.setattr(worker, "_BEAT_S", 0.01)
    gathered = []
    whole = distributed.all_gather_object
    monkeypatch.setattr(
        distributed, "all_gather_object", lambda *a: (gathered.append(a[1]), whole(*a))
    )

    def prepare():
        while len(gathered) < 3:
            time.sleep(0.001)
        return "base"

    assert worker._together(prepare) == "base"
    assert [done for done, _ in gathered[:3]] == [False] * 3

    def refuse():
        raise UserError("no such base", "name another")

    with pytest.raises(UserError, match="no such base"):
        worker._together(refuse)
    with pytest.raises(ZeroDivisionError):
        worker._together(lambda: 1 / 0)
