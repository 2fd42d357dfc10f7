"""A start of Ray that was too slow for its own limits is tried again."""

import pytest

from milm_ray.job import started


@pytest.mark.parametrize(
    "words",
    [
        "The current node timed out during startup. This could happen because …",
        "Timed out waiting for file /tmp/ray/session/gcs_server_port_1 to be created",
    ],
)
def test_a_slow_start_is_tried_twice_again(words: str) -> None:
    done: list[str] = []

    def start() -> str:
        done.append("start")
        if done.count("start") < 3:
            raise RuntimeError(words)
        return "a node"

    assert started(start, lambda: done.append("clear")) == "a node"
    assert done == ["start", "clear", "start", "clear", "start"]


def test_what_is_not_slow_is_not_tried_again() -> None:
    done: list[str] = []

    def start() -> None:
        done.append("start")
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file"):
        started(start, lambda: done.append("clear"))
    assert done == ["start"]
