"""The reply store: durable, shared by writers, tolerant of crashes, readable by name."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from milm_ray.config import LLMSection
from milm_ray.errors import UserError
from milm_ray.llm.replies import Reply, Request, Subject, request_key
from milm_ray.llm.reply_store import ReplyStore
from milm_ray.workspace import Workspace

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def reply(key: str, text: str = "好", **facts: object) -> Reply:
    return Reply(key=key, text=text, **facts)  # type: ignore[arg-type]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "ws"))


def test_a_reply_comes_back_whole_in_another_process_view(workspace: Workspace) -> None:
    kept = reply(
        ONE,
        "两行\n“文”",
        prompt_tokens=7,
        completion_tokens=3,
        cost=0.1,
        subject=Subject("a", "b", "c"),
    )
    ReplyStore(workspace).put([kept])
    found = ReplyStore(workspace).get(ONE)
    assert found == kept
    assert found is not None
    assert found.subject == kept.subject


def test_opening_and_reading_write_nothing(workspace: Workspace, tmp_path: Path) -> None:
    assert ReplyStore(workspace).get(ONE) is None
    assert list(tmp_path.iterdir()) == []


def test_writers_have_files_of_their_own_and_see_each_other_after_a_refresh(
    workspace: Workspace,
) -> None:
    first, second = ReplyStore(workspace), ReplyStore(workspace)
    first.put([reply(ONE)])
    second.put([reply(TWO)])
    assert first.get(TWO) is None
    first.refresh()
    assert first.get(TWO) == reply(TWO)
    second.put([reply(THREE)])
    first.refresh()
    assert first.get(THREE) == reply(THREE)
    assert len(list(Path(workspace.path("replies")).glob("*.jsonl"))) == 2


@pytest.mark.parametrize("cut", [1, 30, 90, -1])
def test_a_line_torn_by_a_crash_is_as_if_never_written(workspace: Workspace, cut: int) -> None:
    store = ReplyStore(workspace)
    store.put([reply(ONE)])
    (path,) = Path(workspace.path("replies")).glob("*.jsonl")
    with path.open("ab") as stream:
        stream.write(reply(TWO).line()[:cut])
    after = ReplyStore(workspace)
    assert after.get(ONE) == reply(ONE)
    assert after.get(TWO) is None
    after.put([reply(TWO)])
    assert ReplyStore(workspace).get(TWO) == reply(TWO)


def test_a_damaged_line_costs_only_itself(workspace: Workspace) -> None:
    store = ReplyStore(workspace)
    store.put([reply(ONE), reply(TWO)])
    (path,) = Path(workspace.path("replies")).glob("*.jsonl")
    data = path.read_bytes()
    path.write_bytes(b"\x00\x00 garbage\n" + data)
    after = ReplyStore(workspace)
    assert after.get(ONE) == reply(ONE)
    assert after.get(TWO) == reply(TWO)


def test_what_was_put_survives_a_kill_of_the_writer(workspace: Workspace) -> None:
    code = (
        "import os, signal, sys\n"
        "from milm_ray.llm.replies import Reply\n"
        "from milm_ray.llm.reply_store import ReplyStore\n"
        "from milm_ray.workspace import Workspace\n"
        "store = ReplyStore(Workspace.open(sys.argv[1]))\n"
        "store.prepare()\n"
        "store.put([Reply(key='1' * 64, text='kept')])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, workspace.root], check=False)
    store = ReplyStore(workspace)
    assert store.get(ONE) == reply(ONE, "kept")
    # The space that the dead writer held back is given free by the next one.
    store.prepare()
    assert len(list(Path(workspace.path("replies")).glob("*.reserve"))) == 1
    store.release()
    assert list(Path(workspace.path("replies")).glob("*.reserve")) == []


def test_a_living_writers_reserve_is_left_alone(workspace: Workspace) -> None:
    first, second = ReplyStore(workspace), ReplyStore(workspace)
    first.prepare()
    second.prepare()
    assert len(list(Path(workspace.path("replies")).glob("*.reserve"))) == 2


def test_a_full_disk_loses_no_reply_that_arrived_and_stops_the_asking(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReplyStore(workspace)
    store.prepare()
    store.put([reply(ONE)])
    real = os.write
    reserve = next(Path(workspace.path("replies")).glob("*.reserve"))

    def full_while_reserved(descriptor: int, data: bytes) -> int:
        if reserve.exists():
            real(descriptor, data[:10])  # a part of the line is on the disk already
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full_while_reserved)
    store.put([reply(TWO)])
    with pytest.raises(UserError, match="No space left"):
        store.prepare()
    after = ReplyStore(workspace)
    assert after.get(ONE) == reply(ONE)
    assert after.get(TWO) == reply(TWO)


def test_a_store_that_cannot_be_written_says_so_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ReplyStore(Workspace(str(tmp_path), pafs.LocalFileSystem(), str(tmp_path / "file")))
    with pytest.raises(UserError, match="cannot be written") as caught:
        store.prepare()
    assert "free space" in caught.value.fix


def test_an_object_store_gets_whole_objects(tmp_path: Path) -> None:
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    workspace = Workspace("mock://bucket/ws", filesystem, "ws")
    first, second = ReplyStore(workspace), ReplyStore(workspace)
    first.prepare()
    first.put([reply(ONE), reply(TWO)])
    first.put([reply(THREE)])
    assert len(list((tmp_path / "ws" / "replies").iterdir())) == 2
    second.refresh()
    assert [second.get(key) for key in (ONE, TWO, THREE)] == [reply(ONE), reply(TWO), reply(THREE)]


def test_recorded_rows_are_found_by_corpus_source_and_prompt(
    workspace: Workspace, tmp_path: Path
) -> None:
    row = {"corpus": "Psy-Insight", "source_id": 7, "prompt": "p.md", "reply": "{}"}
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "rows.jsonl").write_text(json.dumps(row))
    store = ReplyStore(workspace, [str(tmp_path / "recorded")])
    found = store.get(ONE, Subject("psy_insight", "7", "p.md"))
    assert found is not None
    assert (found.text, found.finish_reason, found.prompt_tokens) == ("{}", "recorded", None)
    assert found.key == ONE
    assert store.get(ONE, Subject("psy_insight", "7", "other.md")) is None
    assert store.get(ONE) is None


def test_a_recorded_reply_with_half_a_character_can_be_stored(
    workspace: Workspace, tmp_path: Path
) -> None:
    row = {"corpus": "efaqa", "source_id": "7", "prompt": "p.md", "reply": "好的\ud83d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    store = ReplyStore(workspace, [str(tmp_path / "rows.jsonl")])
    found = store.get(ONE, Subject("efaqa", "7", "p.md"))
    assert found is not None
    assert found.text == r"好的\ud83d"


def test_another_workspaces_replies_can_be_read_beside_it_compressed_too(
    workspace: Workspace, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(reply(ONE).line() + reply(TWO).line()))
    store = ReplyStore(workspace, [str(other)])
    assert store.get(TWO) == reply(TWO)


def test_a_recorded_file_of_something_else_is_refused_with_its_line(
    workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text('{"corpus": "a", "source_id": "b", "prompt": "c"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 1"):
        ReplyStore(workspace, [str(tmp_path / "x.jsonl")])
    with pytest.raises(UserError, match="cannot be read"):
        ReplyStore(workspace, [str(tmp_path / "absent.jsonl")])


def test_the_key_changes_with_all_that_shapes_the_reply_and_nothing_else() -> None:
    request = Request([{"role": "user", "content": "问"}])
    settings = LLMSection()
    key = request_key(settings, request)
    for change in (
        {"model": "m"},
        {"temperature": 0.1},
        {"top_p": 0.5},
        {"max_tokens": 9},
        {"seed": 1},
    ):
        assert request_key(LLMSection(**change), request) != key
    for other in (
        Request([{"role": "user", "content": "问 "}]),
        Request(request.messages, schema={}),
        Request(request.messages, version="adapter-2"),
    ):
        assert request_key(settings, other) != key
    same = Request(request.messages, subject=Subject("a", "b", "c"))
    assert request_key(LLMSection(concurrency=2, timeout_s=9, max_cost=1), same) == key
