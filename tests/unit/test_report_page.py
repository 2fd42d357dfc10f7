"""The report: what it shows, what it says of absent artifacts, and where its numbers come from."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import miti_sample
import pytest
import report_sample

from milm_ray.config import Config, load_config
from milm_ray.errors import UserError
from milm_ray.miti import codings, study, study_packet
from milm_ray.miti.paper_study import NOTES
from milm_ray.report import page, paper, run
from milm_ray.report.blocks import INTERVAL, Column, Estimate, Table
from milm_ray.report.stage import STAGE
from milm_ray.workspace import Workspace


class _Page(HTMLParser):
    """The text of a page, its links and sources, and its open tags."""

    _VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data + " "


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Workspace, str]:
    config, ws = report_sample.build(tmp_path_factory.mktemp("report"))
    STAGE.run(config, ws)
    return config, ws, ws.read_text("report", "index.html")


def test_page_is_well_formed_and_reaches_for_nothing_outside(
    built: tuple[Config, Workspace, str],
) -> None:
    page = _Page(built[2])
    assert page.links
    assert len(set(page.ids)) == len(page.ids)
    outside = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert outside == []
    assert not {"script", "iframe", "link"} & set(page.tags)
    assert "url(" not in built[2].split("</style>")[0]


def test_text_of_the_data_is_escaped(built: tuple[Config, Workspace, str]) -> None:
    assert "停不下来<b>" not in built[2]
    assert report_sample.CLIENT in _Page(built[2]).text


def test_scores_on_the_page_are_those_of_the_metrics(built: tuple[Config, Workspace, str]) -> None:
    _, ws, html = built
    summary = json.loads(ws.read_text("metrics", "summary.json"))
    rows = list(csv.DictReader(io.StringIO(ws.read_text("report", "figure3_scores_greedy.csv"))))
    assert len(rows) == len(report_sample.MODELS) * len(summary["metrics"])
    of_glm4 = next(row for row in rows if row["Model"] == "glm4" and row["Metric"] == "BLEU-4")
    gain = next(d for d in summary["differences"] if d["model"] == "glm4")["scores"]["bleu_4"]
    assert float(of_glm4["Base"]) == gain["base"]
    assert float(of_glm4["MI-LLM"]) == gain["adapter"]
    assert float(of_glm4["Gain low"]) == gain["low"]
    text = re.sub(r"\s+", " ", _Page(html).text)
    assert f"{gain['difference']:.2f} {gain['low']:.2f} to {gain['high']:.2f}" in text
    assert f"BLEU-4 gain, glm4, {gain['low']:+.2f} to {gain['high']:+.2f}" in text


def test_a_model_tuned_on_preferences_stands_beside_its_adapter(
    built: tuple[Config, Workspace, str], tmp_path: Path
) -> None:
    config, ws = report_sample.build(tmp_path, tuned=["llama3"])
    STAGE.run(config, ws)
    html = ws.read_text("report", "index.html")
    text = re.sub(r"\s+", " ", _Page(html).text)
    rows = list(csv.DictReader(io.StringIO(ws.read_text("report", "dpo_scores_greedy.csv"))))
    assert {row["Model"] for row in rows} == {"llama3"}
    bleu = next(row for row in rows if row["Metric"] == "BLEU-4")
    gain = float(bleu["MI-LLM, DPO"]) - float(bleu["MI-LLM"])
    assert float(bleu["Gain"]) == pytest.approx(gain)
    assert gain > 0
    varied = list(csv.DictReader(io.StringIO(ws.read_text("report", "diversity.csv"))))
    assert [row["Variant"] for row in varied].count("MI-LLM, DPO") == 1
    (tuned,) = csv.DictReader(io.StringIO(ws.read_text("report", "preference_tuning.csv")))
    assert (tuned["Model"], tuned["Judged by"], tuned["Pairs"]) == ("llama3", "judge-1", "12")
    assert "Preference tuning of llama3" in text
    assert "3 models" in text
    assert text.count(report_sample.AFTER_DPO) == 3  # the examples
    # Nothing of it where no model was tuned so.
    assert "DPO" not in _Page(built[2]).text


def test_paper_stands_beside_each_model(built: tuple[Config, Workspace, str]) -> None:
    text = _Page(built[2]).text
    for base, tuned in paper.BLEU_4.values():
        assert f"{base:.2f} → {tuned:.2f}" in text
    for row in paper.TABLE_1:
        assert row.source in text
    for note in paper.NOTES:  # this sample has no curation
        assert (note.finding in text) == (note.section != "curation")


def test_a_model_that_the_paper_lacks_has_no_figure_of_it(
    built: tuple[Config, Workspace, str],
) -> None:
    config, ws, _ = built
    qwen = config.models["glm4"].model_copy(update={"chat_format": "qwen2"})
    other = config.model_copy(update={"models": {**config.models, "glm4": qwen}})
    tables = page.tables(page.sections(other, ws, run.manifests(ws)))
    (scores,) = (table for table in tables if table.name == "figure3_scores_greedy")
    of_paper = {row[0]: row[-1] for row in scores.rows if row[1] == "BLEU-4"}
    assert of_paper == {"baichuan2": "2.10 → 5.84", "glm4": None, "llama3": "2.39 → 5.79"}


def test_every_section_names_the_manifests_behind_it(built: tuple[Config, Workspace, str]) -> None:
    _, ws, html = built
    for artifact in ("dialogues", "mi_dialogues", "adapters/llama3", "predictions", "metrics"):
        manifest = ws.manifest(artifact)
        assert f"{artifact}/manifest.json" in html
        assert f"sha256 {manifest['digest']}" in html
        assert manifest["finished_at"] in html


def test_what_is_absent_is_said_absent(built: tuple[Config, Workspace, str]) -> None:
    text = re.sub(r"\s+", " ", _Page(built[2]).text)
    assert "selection/ is not in this workspace. jobs/curate.py makes it." in text
    assert "Figure 2" not in text


def test_scores_are_broken_down_by_round_and_topic(built: tuple[Config, Workspace, str]) -> None:
    _, ws, _ = built
    for name, head in (("scores_by_round", "Round"), ("scores_by_topic", "Topic")):
        rows = list(csv.DictReader(io.StringIO(ws.read_text("report", f"{name}.csv"))))
        of_glm4 = [row for row in rows if row["Model"] == "glm4"]
        assert len(of_glm4) == len({row[head] for row in of_glm4})
        assert sum(int(row["Rounds"]) for row in of_glm4) == 8
        assert all(float(row["BLEU-4, MI-LLM"]) > float(row["BLEU-4, Base"]) for row in of_glm4)
    varied = list(csv.DictReader(io.StringIO(ws.read_text("report", "diversity.csv"))))
    assert {row["Variant"] for row in varied} == {"Base", "MI-LLM"}


def studied(home: Path) -> tuple[Config, Workspace]:
    """A workspace with the whole study of the sample, and no adapters."""
    config = miti_sample.config_of(home)
    ws, _ = miti_sample.with_sessions(config)
    for stage in (study_packet.STAGE, codings.STAGE, study.STAGE):
        stage.run(config, ws)
    for model in config.models:
        ws.clear(f"adapters/{model}")
    return config, ws


def test_the_study_is_shown_with_who_coded_and_how_to_read_it(tmp_path: Path) -> None:
    config, ws = studied(tmp_path)
    STAGE.run(config, ws)
    html = ws.read_text("report", "index.html")
    text = re.sub(r"\s+", " ", _Page(html).text)
    assert "For clinicians. MITI counts" in text
    assert "none yet: no sheet has come back" in text
    assert "AUTOMATIC codes, by trained-zh" in text
    assert "3.27 (real clients)" in text
    assert 'id="miti_table6_people"' not in html
    client = ws.manifest("sessions/simulated")["consistency"]
    shown = csv.DictReader(io.StringIO(ws.read_text("report", "miti_simulator.csv")))
    by_figure = {row["Figure"].split(" ")[0]: row["n"] for row in shown}
    assert by_figure["Left"] == str(client["began_in_precontemplation"])
    assert by_figure["Mean"] == str(client["client_turns"])
    for finding, _ in NOTES:
        assert finding in text
    for artifact in ("sessions/simulated", "packet", "codings", "study"):
        assert f"sha256 {ws.manifest(artifact)['digest']}" in html
    assert ws.exists("report", "miti_table6_trained_zh.csv")
    coder = csv.DictReader(io.StringIO(ws.read_text("report", "miti_trained_coder.csv")))
    complex_ones = next(row for row in coder if row["Code"] == "complex reflection")
    counted = [complex_ones[name] for name in ("Labels", "Best guesses", "Expected")]
    assert counted == ["175", "263", "221"]


def test_a_study_of_another_version_is_named_with_what_to_do(tmp_path: Path) -> None:
    config, ws = studied(tmp_path)
    written = json.loads(ws.read_text("study", "study.json"))
    del written["layout"]
    old = written | {"tables": [{"name": "table4", "columns": ["Group"], "rows": []}]}
    ws.write_text(json.dumps(old), "study", "study.json")
    with pytest.raises(UserError, match=r"another version(.|\n)*run jobs/miti\.py again"):
        STAGE.run(config, ws)


def test_an_empty_workspace_gives_a_page_without_results(tmp_path: Path) -> None:
    config = load_config(report_sample.config_file(tmp_path))
    ws = Workspace.open(config.workspace)
    manifest = STAGE.run(config, ws)
    text = _Page(ws.read_text("report", "index.html")).text
    assert manifest["counts"]["artifacts"] == 0
    assert "No stage has finished in this workspace yet" in text
    for job in ("ingest", "curate", "transcribe", "finetune", "generate", "score"):
        assert f"jobs/{job}.py makes it" in text
    assert "Figure 3" not in text


def test_report_is_written_again_only_when_an_artifact_changed(tmp_path: Path) -> None:
    config, ws = report_sample.build(tmp_path)
    first = STAGE.run(config, ws)
    assert STAGE.plan(config, ws).done
    assert STAGE.run(config, ws) == first
    ws.clear("metrics")
    assert not STAGE.plan(config, ws).done
    STAGE.run(config, ws)
    assert "metrics/ is not in this workspace" in ws.read_text("report", "index.html")


def test_examples_show_reference_and_both_replies(built: tuple[Config, Workspace, str]) -> None:
    text = _Page(built[2]).text
    assert text.count("Reference") == 3
    assert report_sample.REFERENCE in text
    for reply in report_sample.REPLIES.values():
        assert text.count(reply) == 3 * len(report_sample.MODELS)


def test_replies_are_counted_and_their_length_is_set_beside_the_references(
    built: tuple[Config, Workspace, str],
) -> None:
    _, ws, html = built
    rows = list(csv.DictReader(io.StringIO(ws.read_text("report", "predictions.csv"))))
    of_base = next(row for row in rows if row["Model"] == "llama3" and row["Variant"] == "base")
    assert float(of_base["Characters each"]) == len(report_sample.REPLIES["base"])
    assert f"{len(report_sample.REFERENCE):.1f} characters on average" in _Page(html).text


def test_transcription_pair_shows_source_and_rewrite(built: tuple[Config, Workspace, str]) -> None:
    text = _Page(built[2]).text
    assert "Source, 3 rounds" in text
    assert "Transcribed, 2 rounds" in text
    assert report_sample.SOURCE_REPLY in text


def test_transcription_says_what_it_cost_and_what_was_lost(
    built: tuple[Config, Workspace, str],
) -> None:
    text = re.sub(r"\s+", " ", _Page(built[2]).text)
    for shown in ("teacher-1", "12,345", "6,789", "1.25", "The corpus cpsycound"):
        assert shown in text
    assert "cpsycound not_json 1" in text


def test_table_3_sets_the_paper_beside_the_same_set(
    built: tuple[Config, Workspace, str],
) -> None:
    _, ws, _ = built
    rows = list(csv.DictReader(io.StringIO(ws.read_text("report", "table3_statistics.csv"))))
    assert [(row["Set"], row["Paper: rounds"]) for row in rows] == [
        ("corpus cpsycound", "7.65"),
        ("MI train", "7.97"),
        ("MI test", "7.53"),
    ]
    assert rows[1]["Paper: client"] == ""


def test_unknown_cost_is_not_shown_as_zero(tmp_path: Path) -> None:
    config, ws = report_sample.build(tmp_path)
    manifest = ws.manifest("mi_dialogues")
    manifest["usage"] |= {
        "prompt_tokens": 0,
        "replies_with_unknown_tokens": 11,
        "cost_usd": None,
        "replies_with_unknown_cost": 11,
    }
    ws.write_text(json.dumps(manifest), "mi_dialogues", "manifest.json")
    STAGE.run(config, ws)
    text = re.sub(r"\s+", " ", _Page(ws.read_text("report", "index.html")).text)
    assert "Prompt tokens –" in text
    assert "Cost, USD –" in text


def test_csv_keeps_full_precision_and_splits_what_stands_beside_a_number() -> None:
    table = Table(
        "t",
        "",
        [
            Column("Model"),
            Column("Score", digits=2, numeric=True, parts=INTERVAL),
            Column("Count", digits=1, numeric=True, parts=("q1", "q3", "n")),
            Column("n"),
        ],
        [
            ["a", Estimate(1.23456, 1.0, 2.0), Estimate(2, 1, 3, 10), 3],
            ["b", Estimate(None), None, 4],
        ],
    )
    assert table.csv() == (
        "Model,Score,Score low,Score high,Count,Count q1,Count q3,Count n,n\n"
        "a,1.23456,1.0,2.0,2,1,3,10,3\n"
        "b,,,,,,,,4\n"
    )


def test_groups_join_only_rows_that_follow_each_other() -> None:
    rows = [["a", 1], ["a", 2], ["b", 3], ["a", 4]]
    table = Table("t", "", [Column("x"), Column("y")], rows, grouped=True)
    assert [len(group) for group in table.groups] == [2, 1, 1]
