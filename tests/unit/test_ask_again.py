"""Rows without a reply are asked for again by the next run, and hold up nothing after them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from milm_ray.config import Config
from milm_ray.dataset import curate, transcribe
from milm_ray.errors import UserError
from milm_ray.llm.ask import Asking, Call
from milm_ray.llm.exchange import Row
from milm_ray.llm.replies import Reply, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.workspace import Workspace
from tests.llm_server import right_answer
from tests.transcription_job import workspace_with_dialogues

CONFIG = Config.model_validate({"transcribe": {"max_reject_rate": 0.5}})
Run = Callable[[Config, Workspace], Mapping[str, Any]]


class Server:
    """Takes the place of the cluster's asking: answers all rows but the first, until it may."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.gone = self.answers_all = False
        self.asked = 0

    def send(
        self, asking: Asking, rows: Sequence[Row], missing: Sequence[Call]
    ) -> dict[int, tuple[str, str]]:
        if self.gone:
            raise UserError("http://llm does not answer")
        self.asked += 1
        failed, replies = {}, []
        for call in missing:
            request = asking.task.request(rows[call.number])
            if call.number == 0 and not self.answers_all:
                failed[call.number] = (self.reason, "HTTP 500")
            else:
                key = request_key(asking.settings, request)
                replies.append(Reply(key, right_answer([dict(m) for m in request.messages])))
        ReplyStore(asking._workspace).put(replies)
        return failed


@pytest.mark.parametrize(
    ("run", "artifact"), [(transcribe.run, "mi_dialogues"), (curate.run, "verdicts")]
)
@pytest.mark.parametrize("reason", ["no_reply", "bad_request"])
def test_a_row_without_a_reply_is_asked_again_and_the_artifact_stays_where_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    run: Run,
    artifact: str,
    reason: str,
) -> None:
    workspace, server = workspace_with_dialogues(tmp_path), Server(reason)
    monkeypatch.setattr(Asking, "_send", lambda *given: server.send(*given))
    first = run(CONFIG, workspace)
    made = workspace.manifest(artifact)
    assert reason in str(made["counts"])
    server.gone = True
    with caplog.at_level(logging.WARNING):
        assert run(CONFIG, workspace) == first
    assert workspace.manifest(artifact) == made
    assert "does not answer" in caplog.text
    server.gone, server.answers_all = False, True
    run(CONFIG, workspace)
    assert reason not in str(workspace.manifest(artifact)["counts"])
    run(CONFIG, workspace)
    assert server.asked == 2


def test_an_artifact_that_is_not_there_yet_is_not_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, server = workspace_with_dialogues(tmp_path), Server("no_reply")
    monkeypatch.setattr(Asking, "_send", lambda *given: server.send(*given))
    server.gone = True
    with pytest.raises(UserError, match="does not answer"):
        transcribe.run(CONFIG, workspace)
