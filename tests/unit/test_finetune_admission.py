"""Models on a cluster too small for all of them: who waits for what."""

from __future__ import annotations

import logging
import threading

import pytest

from milm_ray.config import FinetuneSection
from milm_ray.errors import UserError
from milm_ray.finetune import cluster
from milm_ray.finetune.admission import Admission, Demand


def test_a_model_waits_until_there_is_room_and_says_what_for(caplog):
    admission = Admission({"CPU": 8.0, "GPU": 2.0})
    ended = threading.Event()
    order: list[str] = []

    def train(model: str, gpus: float) -> None:
        with admission.admitted(model, Demand(1, gpus)):
            order.append(model)
            ended.wait(300)

    threads = []
    with caplog.at_level(logging.INFO, logger="milm_ray"):
        for model, gpus in (("llama3", 1), ("glm4", 1), ("baichuan2", 2)):
            threads.append(threading.Thread(target=train, args=(model, gpus), daemon=True))
            threads[-1].start()
            while model not in order and "baichuan2 | waits" not in caplog.text:
                threads[-1].join(0.01)
        assert order == ["llama3", "glm4"]
        message = "finetune baichuan2 | waits for 1 CPU and 2 GPU; the cluster has 8 CPU and 2 GPU"
        assert message in caplog.text
        assert "held by llama3 (1 CPU and 1 GPU), glm4 (1 CPU and 1 GPU)" in caplog.text
        ended.set()
        for thread in threads:
            thread.join()
    assert order == ["llama3", "glm4", "baichuan2"]


def test_a_model_that_fails_makes_room():
    admission = Admission({"CPU": 1.0})
    with pytest.raises(ZeroDivisionError), admission.admitted("a", Demand(1, 0)):
        raise ZeroDivisionError
    with admission.admitted("b", Demand(1, 0)):
        pass


def test_a_local_cluster_too_small_for_one_model_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    demand = cluster.demand_of(FinetuneSection(workers_per_model=4))
    with pytest.raises(UserError, match="take 4 CPU and 4 GPU, the cluster has 8 CPU and 1 GPU"):
        cluster.check_capacity({"CPU": 8.0, "GPU": 1.0}, demand)
    cluster.check_capacity({"CPU": 8.0, "GPU": 4.0}, demand)
    # A cluster that one has joined may grow.
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cluster.check_capacity({"CPU": 8.0}, demand)
