"""A served model as counselor, against a server that stands for the endpoint."""

import asyncio
from pathlib import Path

import pytest

from milm_ray.config import Config
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.schema import Turn
from milm_ray.serving.batch import Run
from milm_ray.serving.counselors import Counselor
from milm_ray.workspace import Workspace
from tests.llm_server_process import ServerProcess

BASE = Path(__file__).parents[2] / "milm_ray" / "samples" / "models" / "tiny-llama3"
LONG = [Turn("client", "我睡不好。"), Turn("counselor", "您很累。")] * 40


@pytest.fixture
def counselor(tmp_path):
    """A counselor of `decoding`, and the server behind it."""
    servers = []

    def start(decoding):
        servers.append(ServerProcess(tmp_path / f"{decoding}.jsonl", key="none"))
        config = Config.model_validate(
            {
                "serve": {"max_model_len": 256},
                "generate": {"max_new_tokens": 64},
                "simulate": {"decoding": decoding},
            }
        )
        run = Run("llama3", "adapter", "llama3:mi", "v1", "llama3", str(BASE))
        store = ReplyStore(Workspace.open(str(tmp_path / decoding)))
        return Counselor(config, run, servers[-1].url, store), servers[-1]

    yield start
    for server in servers:
        server.kill()


def replies(counselor, *asked):
    async def all_of_them():
        return [await counselor(turns, seed) for turns, seed in asked]

    return asyncio.run(all_of_them())


def test_a_session_too_long_for_the_model_loses_its_oldest_rounds(counselor):
    speaks, server = counselor("greedy")
    last = Turn("client", "今晚又没睡。")
    (short, none), (_, dropped) = replies(speaks, ([last], 1), ([*LONG, last], 1))
    assert none == 0
    assert 20 < dropped < 40
    assert short.text
    prompts = [event["prompt_tokens"] for event in server.events("answered")]
    assert prompts[1] < sum(len(turn.content) for turn in LONG)


def test_seeds_draw_apart_only_where_replies_are_sampled(counselor):
    turn = [Turn("client", "我睡不好。")]
    sampled, server = counselor("sampled")
    replies(sampled, (turn, 1), (turn, 2), (turn, 1))
    # LLaMA-Factory's defaults.
    drawn = {"temperature": 0.95, "top_p": 0.7, "top_k": 50}
    asked = [event["sampling"] for event in server.events("asked")]
    assert sorted(asked, key=lambda sampling: sampling["seed"]) == [
        {**drawn, "seed": 1},
        {**drawn, "seed": 2},
    ]
    greedy, server = counselor("greedy")
    replies(greedy, (turn, 1), (turn, 2))
    (asked,) = server.events("asked")
    assert asked["sampling"] == {"temperature": 0, "top_p": 1, "top_k": None, "seed": None}
