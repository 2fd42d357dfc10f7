"""The score and report jobs as commands, and the page in a real browser at three widths.

Where no Chromium is installed, the same content is asserted on the HTML itself.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import miti_sample
import pytest
import report_sample

from milm_ray.miti import codings, study, study_packet
from milm_ray.report.stage import STAGE as REPORT
from tests.browser import CHROMIUM, needs_chromium

ROOT = Path(__file__).parents[2]

# Widths in CSS pixels: a phone's, a small window's and a desktop's.
_WIDTHS = (390, 1100, 1280)
_PRINTED = 673  # what the margins leave of a sheet of A4

_HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const widths = {widths};
const report = {report};
let left = widths.length;
for (const width of widths) {{
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${{width}}px;height:900px;border:0`;
  frame.onload = () => {{
    const page = frame.contentDocument;
    const out = document.createElement("pre");
    out.className = "measured";
    out.textContent = JSON.stringify({{
      width, scroll: page.documentElement.scrollWidth,
      clipped: [...page.querySelectorAll(".scroll")]
        .filter(table => table.scrollWidth > table.clientWidth)
        .map(table => table.parentElement.id),
      images: [...page.images].map(image => image.naturalWidth),
      headings: [...page.querySelectorAll("h2")].map(heading => heading.textContent),
      text: page.body.innerText,
    }});
    frame.remove();
    document.body.append(out);
  }};
  frame.srcdoc = report;
  document.body.append(frame);
}}
</script>"""


def _job(name: str, config: Path) -> str:
    """Run a job and return what it printed."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose metrics and report were made by the jobs."""
    folder = tmp_path_factory.mktemp("jobs")
    _, ws = report_sample.build(folder)
    ws.clear("metrics")
    config = folder / "sample.yaml"
    _job("score", config)
    assert "metrics/ is up to date" in _job("score", config)
    _job("report", config)
    return Path(ws.uri)


@pytest.mark.slow
def test_score_job_writes_scores_summary_and_figure(workspace: Path) -> None:
    metrics = workspace / "metrics"
    manifest = json.loads((metrics / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"] == {
        "rows": 48,
        "rounds": 8,
        "dialogues": 4,
        "empty": 0,
        "truncated": 0,
    }
    assert set(manifest["made_from"]["inputs"]) == {"predictions", "test_rounds"}
    assert (metrics / "figure3.png").read_bytes().startswith(b"\x89PNG")
    lines = (metrics / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,variant,sampling,metric,mean,low,high,rounds,dialogues"
    assert len(lines) == 1 + 6 * 5


@pytest.mark.slow
def test_page_shows_everything_at_phone_and_desktop_width(workspace: Path, tmp_path: Path) -> None:
    report = (workspace / "report" / "index.html").read_text(encoding="utf-8")
    wanted = [report_sample.CLIENT, report_sample.REFERENCE, "BLEU-4", "2.10 → 5.84"]
    wanted += list(report_sample.REPLIES.values())
    if CHROMIUM is None:
        text = html.unescape(re.sub(r"<[^>]+>", "", report))
        assert [piece for piece in wanted if piece not in text] == []
        assert report.count("<h2>") == len(re.findall(r"<section ", report))
        return
    for measured in _measure(report, tmp_path):
        assert measured["scroll"] <= measured["width"], "the page scrolls sideways"
        assert measured["clipped"] == []
        assert len(measured["images"]) == 2
        assert all(width > 0 for width in measured["images"]), "an image did not load"
        assert "Base against MI-LLM" in measured["headings"]
        assert [piece for piece in wanted if piece not in measured["text"]] == []


@pytest.mark.slow
@needs_chromium
def test_no_table_is_clipped_on_screen_or_paper(tmp_path: Path) -> None:
    """The widest there are: a study by two people and a coder, and models tuned in two steps."""
    (tmp_path / "tuned").mkdir()
    config, ws = report_sample.build(tmp_path / "tuned", tuned=["llama3"])
    REPORT.run(config, ws)
    reports = [ws.read_text("report", "index.html")]
    cells = tmp_path / "cells.csv"
    groups = [f"6,{name},affirm,3.5,2,4.25,10" for name in miti_sample.LINES]
    cells.write_text("\n".join(["table,group,variable,mean,q1,q3,n", *groups]), encoding="utf-8")
    config = miti_sample.config_of(tmp_path, f"miti.paper_cells={cells}")
    ws, _ = miti_sample.with_sessions(config)
    study_packet.run(config, ws)
    for coder, score in (("anna", 4), ("ben", 2)):
        miti_sample.filled(ws, coder, score)
    for stage in (codings.STAGE, study.STAGE):
        stage.run(config, ws)
    for model in config.models:
        ws.clear(f"adapters/{model}")
    REPORT.run(config, ws)
    reports.append(ws.read_text("report", "index.html"))
    assert "dpo_scores_greedy" in reports[0]
    assert "miti_comparisons_people" in reports[1]
    for report in reports:
        for measured in _measure(report, tmp_path):
            assert measured["clipped"] == [], f"at {measured['width']} pixels"
        paper = report.replace("@media print", "@media all").replace("@media screen", "@media none")
        (measured,) = _measure(paper, tmp_path, (_PRINTED,))
        assert measured["clipped"] == []
        assert measured["scroll"] <= _PRINTED


def _measure(report: str, folder: Path, widths: tuple[int, ...] = _WIDTHS) -> list[dict]:
    """The page's measures in Chromium, once per width."""
    # A closing script tag in the page's text would end the harness's own script.
    quoted = json.dumps(report).replace("</", "<\\/")
    harness = folder / "harness.html"
    harness.write_text(_HARNESS.format(widths=json.dumps(widths), report=quoted), encoding="utf-8")
    dom = _chromium(folder, "--virtual-time-budget=20000", "--dump-dom", harness.as_uri())
    found = re.findall(r'<pre class="measured">(.*?)</pre>', dom, flags=re.DOTALL)
    measures = [json.loads(html.unescape(text)) for text in found]
    assert sorted(measure["width"] for measure in measures) == sorted(widths)
    return measures


@pytest.mark.slow
@needs_chromium
def test_page_prints(workspace: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    page = workspace / "report" / "index.html"
    _chromium(tmp_path, f"--print-to-pdf={target}", page.as_uri())
    assert target.read_bytes().startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", target.read_bytes())) >= 3


def _chromium(folder: Path, *arguments: str) -> str:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        *arguments,
    ]
    quiet = {**os.environ, "DBUS_SESSION_BUS_ADDRESS": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=quiet)
    assert done.returncode == 0, done.stderr
    return done.stdout
