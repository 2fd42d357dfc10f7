"""The contract of `dialogues/`, `rejects/ingest/` and `repairs/ingest/`, made by the real stage."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milm_ray import samples
from milm_ray.config import Config
from milm_ray.corpora.ingest import STAGE
from milm_ray.errors import ConfigError, UserError
from milm_ray.job import connect, main
from milm_ray.schema import DIALOGUES, REJECTS, dialogue_id, structure_fault, turns_of
from milm_ray.workspace import Workspace

SAMPLES = Path(samples.__file__).parent
LAYOUTS = {
    "cpsycound": "CPsyCounD",
    "psydtcorpus": "PsyDTCorpus",
    "smilechat": "SmileChat",
    "efaqa": "efaqa",
    "psy_insight": "Psy-Insight",
}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    import ray

    ours = not ray.is_initialized()
    connect(Config.model_validate({"ray": {"num_cpus": 2}}))
    yield
    if ours:
        ray.shutdown()


def ingest(
    folder: Path, corpora: dict[str, Any], **settings: Any
) -> tuple[dict[str, Any], Workspace]:
    section = {"corpora": {name: {"path": str(path)} for name, path in corpora.items()}, **settings}
    config = Config.model_validate({"workspace": str(folder), "ingest": section})
    workspace = Workspace.open(config.workspace)
    return dict(STAGE.run(config, workspace)), workspace


def pairs(workspace: Workspace, artifact: str, *names: str) -> list[tuple[Any, ...]]:
    rows = workspace.read_table(artifact).to_pylist()
    return [tuple(row[name] for name in names) for row in rows]


def smile(*contents: str) -> bytes:
    roles = ("client", "counselor")
    turns = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return json.dumps(turns, ensure_ascii=False).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def sample_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Workspace]:
    corpora = {name: SAMPLES / layout for name, layout in LAYOUTS.items()}
    return ingest(tmp_path_factory.mktemp("samples"), corpora)


def test_every_row_is_a_dialogue_with_its_own_id(
    sample_run: tuple[dict[str, Any], Workspace],
) -> None:
    manifest, workspace = sample_run
    table = workspace.read_table("dialogues")
    assert table.schema.equals(DIALOGUES)
    rows = table.to_pylist()
    assert len(rows) == manifest["counts"]["dialogues"]
    for row in rows:
        assert structure_fault(turns_of(row)) is None
        assert row["dialogue_id"] == dialogue_id(row["corpus"], turns_of(row))
    assert len({row["dialogue_id"] for row in rows}) == len(rows)


def test_every_sample_is_read_in_natural_order(
    sample_run: tuple[dict[str, Any], Workspace],
) -> None:
    manifest, workspace = sample_run
    found = pairs(workspace, "dialogues", "corpus", "source_id")
    assert Counter(corpus for corpus, _ in found) == {
        "cpsycound": 42,
        "psydtcorpus": 24,
        "smilechat": 12,
        "efaqa": 12,
        "psy_insight": 12,
    }
    assert [corpus for corpus, _ in found] == sorted(corpus for corpus, _ in found)
    assert [s for c, s in found if c == "cpsycound"] == [f"case_{n}" for n in range(42)]
    assert [s for c, s in found if c == "psydtcorpus"] == [str(n) for n in range(24)]
    assert manifest["corpora"]["cpsycound"]["files"] == 42


def test_recorded_replies_find_their_dialogues(
    sample_run: tuple[dict[str, Any], Workspace],
) -> None:
    """The recorded judge has a reply for each sample under the corpus's own ids."""
    _, workspace = sample_run
    titles = {title: name for name, title in LAYOUTS.items()}
    lines = (SAMPLES / "recorded" / "quality.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = {(titles[r["corpus"]], r["source_id"]) for r in map(json.loads, lines)}
    assert recorded == set(pairs(workspace, "dialogues", "corpus", "source_id"))


def test_bad_files_cost_only_themselves_and_are_listed_by_name(tmp_path: Path) -> None:
    good = {f"{n}.json": smile(f"我睡不好{n}", "多久了？") for n in range(20)}
    bad = {
        "20.json": b"",
        "21.json": b"[{",
        "22.json": smile("只有我"),
        "23.json": '[{"role": "client", "content": "我睡不好，心里很坏'.encode()[:-1],
        "24.json": smile("我睡不好3", "多久了？"),
        "25.json": b"[1, 2]",
        "26.json": smile("a", "b", "c"),
        "27.json": smile("您好", "在").replace(b"client", b"Client"),
    }
    folder = write(tmp_path / "raw", {**good, **bad, "notes.md": b"x"})
    manifest, workspace = ingest(tmp_path / "ws", {"smilechat": folder})
    assert set(pairs(workspace, "rejects/ingest", "source_id", "reason")) == {
        ("20", "empty"),
        ("21", "broken_json"),
        ("22", "one_sided"),
        ("23", "bad_encoding"),
        ("24", "duplicate"),
        ("25", "wrong_shape"),
        ("27", "unknown_speaker"),
    }
    assert workspace.read_table("rejects/ingest").schema.equals(REJECTS)
    details = dict(pairs(workspace, "rejects/ingest", "source_id", "detail"))
    assert details["24"] == "the same turns as 3"
    assert all(f"{s}.json" in detail for s, detail in details.items() if s != "24")
    assert pairs(workspace, "repairs/ingest", "source_id", "reason", "detail") == [
        ("26", "trailing_client_turns_dropped", "1")
    ]
    entry = manifest["corpora"]["smilechat"]
    assert entry["files"] == 28 == entry["dialogues"] + sum(entry["rejects"].values())
    assert entry["files_ignored"] == 1


def test_the_first_of_duplicates_is_kept_across_parts(
    tmp_path: Path,
) -> None:
    """Folders of more than one part; the copies come back in other parts than the originals."""
    files = {f"{n}.json": smile(f"问题{n % 1500}", "回答") for n in range(2100)}
    folder = write(tmp_path / "raw", files)
    manifest, workspace = ingest(tmp_path / "ws", {"smilechat": folder})
    assert len(workspace.parquet_files("dialogues")) > 1
    assert [s for (s,) in pairs(workspace, "dialogues", "source_id")] == [
        str(n) for n in range(1500)
    ]
    assert manifest["counts"]["rejects"] == {"duplicate": 600}
    copies = pairs(workspace, "rejects/ingest", "source_id", "detail")
    assert copies[0] == ("1500", "the same turns as 0")


@pytest.fixture
def near_copies(tmp_path: Path) -> Path:
    """Two dialogues, a near copy of the first and an exact copy of that."""
    words = [chr(0x4E00 + 7 * n % 5000) for n in range(900)]
    first, second = "".join(words[:400]), "".join(words[400:800])
    near = smile(first + "另外的话", "好的")
    return write(
        tmp_path / "raw",
        {
            "0.json": smile(first, "好的"),
            "1.json": smile(second, "嗯"),
            "2.json": near,
            "3.json": near,
        },
    )


@pytest.mark.parametrize("mode", ["report", "drop", "off"])
def test_near_duplicates_are_listed_or_rejected_as_configured(
    tmp_path: Path, near_copies: Path, mode: str
) -> None:
    manifest, workspace = ingest(tmp_path / "ws", {"smilechat": near_copies}, near_duplicates=mode)
    kept = [s for (s,) in pairs(workspace, "dialogues", "source_id")]
    rejects = dict(pairs(workspace, "rejects/ingest", "source_id", "reason"))
    if mode == "drop":
        assert kept == ["0", "1"]
        assert rejects == {"2": "near_duplicate", "3": "duplicate"}
        assert manifest["counts"]["dialogues"] == 2
    else:
        assert kept == ["0", "1", "2"]
        assert rejects == {"3": "duplicate"}
    if mode == "report":
        [(source_id, reason, detail)] = pairs(
            workspace, "repairs/ingest", "source_id", "reason", "detail"
        )
        assert (source_id, reason) == ("2", "near_duplicate_kept")
        assert re.fullmatch(r"similarity 0\.9\d to smilechat 0", detail)
        assert manifest["counts"]["repairs"] == {"near_duplicate_kept": 1}


def test_a_part_of_nothing_but_duplicates_disappears(tmp_path: Path) -> None:
    first = write(tmp_path / "raw" / "a", {"0.json": smile("问", "答")})
    files = {f"{n}.json": smile("问", "答") for n in range(1, 1200)}
    write(tmp_path / "raw" / "b", files)
    manifest, workspace = ingest(tmp_path / "ws", {"smilechat": first.parent})
    assert manifest["counts"]["dialogues"] == 1
    assert pairs(workspace, "dialogues", "source_id") == [("0",)]
    assert manifest["counts"]["rejects"] == {"duplicate": 1199}


def test_the_same_files_give_the_same_artifact_and_are_not_read_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", {f"{n}.json": smile(f"问{n}", "答") for n in range(30)})
    first, workspace = ingest(tmp_path / "ws", {"smilechat": folder})
    again, _ = ingest(tmp_path / "ws", {"smilechat": folder})
    assert again["finished_at"] == first["finished_at"]
    other, _ = ingest(tmp_path / "other", {"smilechat": folder})
    assert other["digest"] == first["digest"]

    write(folder, {"30.json": smile("新的", "答")})
    changed, workspace = ingest(tmp_path / "ws", {"smilechat": folder})
    assert changed["counts"]["dialogues"] == 31
    assert changed["digest"] != first["digest"]
    assert len(workspace.read_table("dialogues")) == 31


def test_a_run_that_was_cut_off_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", {"0.json": smile("问", "答")})
    stale = tmp_path / "ws" / "dialogues"
    stale.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), stale / "smilechat-009-00009.parquet")
    _, workspace = ingest(tmp_path / "ws", {"smilechat": folder})
    assert len(workspace.read_table("dialogues")) == 1


def test_too_many_rejects_fail_the_job_and_are_there_to_look_at(tmp_path: Path) -> None:
    files = {"0.json": smile("问", "答"), "1.json": b"[", "2.json": b"["}
    folder = write(tmp_path / "raw", files)
    with pytest.raises(UserError, match=r"smilechat: 1 dialogues .* 2 could not .*broken_json"):
        ingest(tmp_path / "ws", {"smilechat": folder})
    workspace = Workspace.open(str(tmp_path / "ws"))
    assert len(workspace.read_table("rejects/ingest")) == 2
    assert not workspace.exists("dialogues", "manifest.json")
    manifest, _ = ingest(tmp_path / "ws", {"smilechat": folder}, max_reject_rate=0.7)
    assert manifest["counts"]["dialogues"] == 1


def test_another_corpus_under_the_name_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"psydtcorpus: 0 dialogues"):
        ingest(tmp_path / "ws", {"psydtcorpus": SAMPLES / "Psy-Insight"})


def test_locations_are_checked_together_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    corpora = {"smilechat": tmp_path / "empty", "annomi": tmp_path / "nowhere"}
    with pytest.raises(ConfigError) as caught:
        ingest(tmp_path / "ws", corpora)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="no corpus is configured"):
        ingest(tmp_path / "ws", {})
    assert not (tmp_path / "ws").exists()


def test_a_dry_run_counts_files_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"workspace: {tmp_path / 'ws'}\n"
        f"ingest: {{corpora: {{cpsycound: {{path: {SAMPLES / 'CPsyCounD'}}}}}}}\n"
    )
    assert main("", [STAGE], ["--config", str(config), "--dry-run"]) == 0
    assert not (tmp_path / "ws").exists()
    wrong = ["--config", str(config), "ingest.corpora.cpsycound.path=/nowhere", "--dry-run"]
    assert main("", [STAGE], wrong) == 2
    assert "/nowhere" in capfd.readouterr().err
