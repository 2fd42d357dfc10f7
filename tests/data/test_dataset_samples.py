"""Curate, transcribe and split on the shipped samples, offline, as the quickstart runs them."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from milm_ray.config import Config, load_config
from milm_ray.corpora.readers import READERS
from milm_ray.dataset import curate, split, transcribe
from milm_ray.errors import UserError
from milm_ray.schema import DIALOGUES, MI_DIALOGUES, ROUNDS, VERDICTS, structure_fault, turns_of
from milm_ray.workspace import Workspace

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
FILES = {
    "cpsycound": "CPsyCounD/Data/*.txt",
    "psydtcorpus": "PsyDTCorpus/*.json",
    "smilechat": "SmileChat/data/*.json",
    "efaqa": "efaqa/*.gz",
    "psy_insight": "Psy-Insight/*.json",
}


def quickstart(workspace: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"workspace={workspace}", *overrides])


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the samples' dialogues, read without Ray."""
    import gzip

    rows: list[dict[str, Any]] = []
    for corpus, pattern in FILES.items():
        for path in sorted((ROOT / "milm_ray" / "samples").glob(pattern)):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            parsed = READERS[corpus].read(path.name.removesuffix(".gz"), data)
            rows += [dialogue.row() for dialogue in parsed.dialogues]
    root = tmp_path_factory.mktemp("samples") / "ws"
    workspace = Workspace.open(str(root))
    workspace.write_table(pa.Table.from_pylist(rows, schema=DIALOGUES), "dialogues")
    workspace.commit(
        "dialogues",
        stage="ingest",
        settings={},
        fingerprint={},
        counts={"dialogues": len(rows)},
        started=time.time(),
    )
    return root


@pytest.fixture(scope="module")
def done(ingested: Path) -> Workspace:
    """The same workspace after the three stages of the quickstart."""
    config = quickstart(ingested)
    workspace = Workspace.open(config.workspace)
    for stage in (curate.STAGE, transcribe.STAGE, split.STAGE):
        stage.run(config, workspace)
    return workspace


def test_the_shipped_replies_cover_all_that_the_quickstart_asks(ingested: Path) -> None:
    config = quickstart(ingested)
    workspace = Workspace.open(config.workspace)
    assert curate.STAGE.plan(config, workspace).llm_calls == 0


def test_every_judged_dialogue_has_one_verdict(done: Workspace) -> None:
    table = done.read_table("verdicts")
    assert table.schema.equals(VERDICTS)
    assert table.num_rows == 60
    assert len(set(table["dialogue_id"].to_pylist())) == 60
    counts = done.manifest("verdicts")["counts"]
    assert counts["scored"] + counts["unscored"] == 60


def test_the_selection_shows_every_scale_and_its_figure(done: Workspace) -> None:
    selection = json.loads(done.read_text("selection", "selection.json"))
    assert selection["selected"] == selection["rankings"]["fraction"][:3]
    assert set(selection["rankings"]) == {"fraction", "turn", "dialogue"}
    assert len(selection["corpora"]) == 5
    with done.filesystem.open_input_stream(done.path("selection", "figure2.png")) as stream:
        assert stream.read(8) == b"\x89PNG\r\n\x1a\n"


def test_mi_dialogues_are_dialogues_and_know_their_source(done: Workspace) -> None:
    table = done.read_table("mi_dialogues")
    assert table.schema.equals(MI_DIALOGUES)
    rows = table.to_pylist()
    assert len(rows) == 66
    sources = set(done.read_table("dialogues")["dialogue_id"].to_pylist())
    assert all(row["source_dialogue_id"] in sources for row in rows)
    assert all(structure_fault(turns_of(row)) is None for row in rows)
    usage = done.manifest("mi_dialogues")["usage"]
    assert usage["replies_with_unknown_tokens"] == 66  # recorded replies: unknown, not zero
    assert usage["cost_usd"] is None


def test_train_test_and_rounds_add_up(done: Workspace) -> None:
    train, test = done.read_table("train"), done.read_table("test")
    assert (train.num_rows, test.num_rows) == (54, 12)
    test_rounds = done.read_table("test_rounds")
    assert test_rounds.schema.equals(ROUNDS)
    per_dialogue = sum(len(turns) // 2 for turns in test["turns"].to_pylist())
    assert test_rounds.num_rows == per_dialogue
    rows = {row["set"]: row for row in done.manifest("statistics")["table3"]["rows"]}
    assert rows["MI test"]["rounds"] == per_dialogue
    assert rows["MI train"]["rounds"] + per_dialogue == rows["MI dialogues"]["rounds"]
    index = json.loads(done.read_text("llamafactory", "dataset_info.json"))
    assert all(done.exists("llamafactory", entry["file_name"]) for entry in index.values())


def test_running_again_does_nothing_and_a_changed_setting_does(done: Workspace) -> None:
    config = quickstart(Path(done.root))
    for stage in (curate.STAGE, transcribe.STAGE, split.STAGE):
        assert stage.plan(config, done).done
    before = done.manifest("mi_dialogues")["digest"]
    assert transcribe.STAGE.run(config, done)["digest"] == before
    other = quickstart(Path(done.root), "transcribe.min_rounds=9")
    assert not transcribe.STAGE.plan(other, done).done
    assert split.STAGE.plan(other, done).done  # until the transcription has changed


def test_a_selected_corpus_without_recorded_replies_is_an_error_when_all_are_wanted(
    done: Workspace,
) -> None:
    config = quickstart(Path(done.root), "transcribe.pool=all")
    with pytest.raises(UserError, match="no recorded reply to mi_transcription") as caught:
        transcribe.STAGE.run(config, done)
    assert "pool: recorded" in caught.value.fix


def test_too_many_rejects_fail_the_job_each_time_after_everything_is_written(
    ingested: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "ws"
    shutil.copytree(ingested, copy)
    config = quickstart(copy, "transcribe.min_rounds=10", "transcribe.max_reject_rate=0.1")
    workspace = Workspace.open(config.workspace)
    curate.STAGE.run(config, workspace)
    for _ in range(2):
        with pytest.raises(UserError, match="replies are rejected"):
            transcribe.STAGE.run(config, workspace)
    counts = workspace.manifest("mi_dialogues")["counts"]
    rejects = workspace.read_table("rejects/transcribe").to_pylist()
    assert counts["transcribed"] + len(rejects) == counts["asked"]
    assert {row["reason"] for row in rejects} == {"round_count"}
    assert all(row["raw"] and row["dialogue_id"] and row["corpus"] for row in rejects)
    lenient = quickstart(copy, "transcribe.min_rounds=10", "transcribe.max_reject_rate=0.9")
    assert transcribe.STAGE.run(lenient, workspace)["counts"] == counts


def test_counts_per_corpus_are_a_prefix_of_larger_ones(ingested: Path) -> None:
    from milm_ray.dataset.sampling import sample

    workspace = Workspace.open(str(ingested))
    few = sample(workspace, {"cpsycound": 5}, 42, "x").by_corpus["cpsycound"]
    many = sample(workspace, {"cpsycound": 9}, 42, "x").by_corpus["cpsycound"]
    assert list(many[:5]) == list(few)
    assert list(sample(workspace, {"cpsycound": 5}, 43, "x").by_corpus["cpsycound"]) != list(few)
