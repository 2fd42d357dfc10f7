"""The coding page as a command, driven in Chromium by keyboard; killed and started again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from miti_sample import config_of, with_sessions
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from milm_ray.miti import codings, study_packet
from milm_ray.miti.coding_scheme import GLOBAL_NAMES
from milm_ray.miti.coding_store import CodingStore
from milm_ray.miti.sheet import read_csv
from milm_ray.workspace import Workspace
from tests.browser import CHROMIUM, TIMEOUT_MS, needs_chromium

ROOT = Path(__file__).parents[2]
Study = tuple[Path, Workspace]
pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]


class PageServer:
    """jobs/coding.py in a process of its own."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "jobs/coding.py", "--config", str(config), "--port", "0"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"coding page at (http://\S+)", line):
                self.url = found.group(1)
                return
        raise AssertionError("the coding page did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def make_study(folder: Path) -> Study:
    """A packet of two dialogues, one of each model."""
    config = config_of(folder, "simulate.sessions=1", "simulate.max_rounds=3")
    ws, _ = with_sessions(config)
    study_packet.run(config, ws)
    return folder / "study.yaml", ws


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("coding"))


@pytest.fixture(scope="module")
def coded_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Another, of which anna has finished both dialogues; her first utterance is a CR."""
    path, ws = make_study(tmp_path_factory.mktemp("coded"))
    finish_all(ws, "anna")
    return path, ws


@pytest.fixture(scope="module")
def agreed_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A third, of which both coders have finished both dialogues, alike."""
    path, ws = make_study(tmp_path_factory.mktemp("agreed"))
    finish_all(ws, "anna")
    finish_all(ws, "ben")
    return path, ws


def finish_all(ws: Workspace, coder: str) -> None:
    items = study_packet.load_items(ws)
    store = CodingStore.of(ws, items)
    for item in items:
        spoken = [volley for volley in item.volleys if volley.role == "counselor"]
        places = [(v.number, n + 1) for v in spoken for n in range(len(v.utterances))]
        for row, place in enumerate(places):
            code = "CR" if (item, row) == (items[0], 0) else ("SR", "Q")[row % 2]
            store.set_code(coder, item.item_id, *place, code)
        for name in GLOBAL_NAMES:
            store.set_score(coder, item.item_id, name, 4)
        store.set_text(coder, item.item_id, "target_behavior", "早点睡")
        store.finish(coder, item.item_id)


@pytest.fixture(scope="module")
def browser(study: Study, coded_study: Study, agreed_study: Study) -> Iterator[Browser]:
    # After the studies: Playwright keeps an event loop running in this thread.
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def server(study: Study) -> Iterator[PageServer]:
    with PageServer(study[0]) as started:
        yield started


def opened(browser: Browser, server: PageServer, coder: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(server.url)
    page.get_by_role("button", name=coder, exact=True).click()
    expect(page.locator("#target")).to_be_visible()
    return page


def saved(page: Page) -> None:
    expect(page.locator("#saved")).to_have_text(re.compile("已保存|Saved"))


def code_everything(page: Page, score: int) -> None:
    """The open dialogue by keyboard, and its scores: target, reflections, questions."""
    expect(page.locator("#target")).to_be_focused()
    page.keyboard.type("早点睡")
    page.keyboard.press("Enter")
    expect(page.locator("#dialogue")).to_be_focused()
    # Typed ahead of the server: every key still meets its own utterance, and no click is lost.
    count = page.locator(".u").count()
    page.keyboard.type("".join("sq"[row % 2] for row in range(count)))
    for row in range(count):
        expect(page.locator(".u .code").nth(row)).to_have_text(("SR", "Q")[row % 2])
    for name in GLOBAL_NAMES:
        page.locator(f"#{name}-{score}").click()
    for name in GLOBAL_NAMES:
        expect(page.locator(f"#{name}-{score}")).to_be_checked()
    saved(page)


def test_a_full_dialogue_by_keyboard_survives_a_killed_server_and_exports_as_a_sheet(
    browser: Browser, study: Study, server: PageServer, tmp_path: Path
) -> None:
    config_path, ws = study
    page = opened(browser, server, "anna")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    code_everything(page, 4)

    # The rules of the volley: a second question is refused, a complex reflection ousts the simple.
    page.locator(".u").nth(0).click()
    page.keyboard.press("q")
    expect(page.locator("#message")).to_have_text("每种编码一段只记一次")
    expect(page.locator(".u .code").nth(0)).to_have_text("SR")
    page.keyboard.press("c")
    expect(page.locator(".u .code").nth(0)).to_have_text("CR")
    page.locator(".u").nth(1).click()
    page.keyboard.press("s")
    expect(page.locator("#message")).to_have_text("一段里有 CR，就不再有 SR")
    saved_codes = page.locator(".u .code").all_text_contents()

    server.kill()
    page.locator(".u").nth(0).click()
    page.keyboard.press("0")
    expect(page.locator("#saved")).to_have_text(re.compile("没有保存"))
    expect(page.locator(".u .code").nth(0)).to_have_text("CR")
    page.context.close()

    with PageServer(config_path) as again:
        page = opened(browser, again, "anna")
        expect(page.locator(".u .code")).to_have_text(saved_codes)  # once the dialogue has come
        expect(page.locator("#target")).to_have_value("早点睡")
        expect(page.locator("#empathy-4")).to_be_checked()
        expect(page.locator("#dialogue")).to_be_focused()
        page.get_by_role("button", name="完成这段对话").click()
        expect(page.locator("#name")).to_have_text("item-02")
        expect(page.locator("#target")).to_be_focused()
        page.get_by_role("button", name="完成这段对话").click()
        expect(page.locator("#message")).to_contain_text("还缺：要改变的行为、培育改变语句")
        code_everything(page, 2)
        page.get_by_role("button", name="完成这段对话").click()
        expect(page.locator("#items .done")).to_have_count(2)

        files = []
        for link in ("导出编码 CSV", "导出评分 CSV"):
            with page.expect_download() as download:
                page.get_by_role("link", name=link).click()
            files.append(tmp_path / download.value.suggested_filename)
            download.value.save_as(files[-1])
        packet = study_packet.load_packet(ws)
        sheet = read_csv(*files, packet, "anna")
        config = config_of(config_path.parent)
        assert sheet == codings.import_people(config, ws, packet)
        page.get_by_role("button", name="English").click()
        expect(page.locator("legend").first).to_have_text("Cultivating change talk")
        page.context.close()


def test_two_coders_are_adjudicated_and_do_not_see_each_other(
    browser: Browser, coded_study: Study
) -> None:
    with PageServer(coded_study[0]) as server:
        page = opened(browser, server, "ben")
        expect(page.locator(".u").first).to_be_visible()
        expect(page.locator(".u .code", has_text="CR")).to_have_count(0)
        code_everything(page, 2)
        page.get_by_role("button", name="完成这段对话").click()
        expect(page.locator("#items .done")).to_have_count(1)
        page.context.close()

        page = opened(browser, server, "裁定")
        expect(page.locator("#items button").nth(1)).to_be_disabled()  # ben has not finished it
        expect(page.locator(".u.differ")).to_have_count(1)
        expect(page.locator(".u .others").first).to_have_text("anna: CR　ben: SR")
        expect(page.locator("#target")).to_be_focused()
        page.get_by_role("button", name="采用一致的编码与评分").click()
        expect(page.locator(".u .code", has_text="–")).to_have_count(1)
        page.locator(".u").nth(0).click()
        page.keyboard.press("c")
        expect(page.locator(".u .code").nth(0)).to_have_text("CR")
        page.context.close()


def test_what_coders_agree_on_is_taken_over_into_that_dialogue_alone(
    browser: Browser, agreed_study: Study
) -> None:
    with PageServer(agreed_study[0]) as server:
        page = opened(browser, server, "裁定")
        expect(page.locator("#target")).to_be_focused()
        sent: list[dict[str, str]] = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
        held: list[Route] = []
        page.route(
            "**/api/change",
            lambda route: route.continue_() if held else held.append(route),
        )
        with page.expect_request("**/api/change"):
            page.get_by_role("button", name="采用一致的编码与评分").click()
        # Another dialogue is opened while the first request of many is under way.
        page.get_by_role("button", name="item-02").click()
        held[0].continue_()
        expect(page.locator("#name")).to_have_text("item-02")
        page.locator("#dialogue").focus()
        page.keyboard.press("x")
        expect(page.locator(".u .code").first).to_have_text("CON")
        saved(page)
        assert [change["item"] for change in sent].count("item-02") == 1
        assert sent[-1]["code"] == "confront"
        page.context.close()


def test_text_that_the_server_did_not_get_is_sent_again(
    browser: Browser, study: Study, server: PageServer
) -> None:
    page = opened(browser, server, "anna")
    page.get_by_role("button", name="item-01").click()
    reopen, lost = page.get_by_role("button", name="重新打开"), re.compile("没有保存")
    if reopen.is_visible():
        reopen.click()
    target, comment = page.locator("#target"), page.locator("#comment")
    expect(target).to_be_enabled()
    page.route("**/api/change", lambda route: route.abort())
    target.fill("少看手机")
    page.locator("#dialogue").focus()
    expect(page.locator("#saved")).to_have_text(lost)
    page.unroute("**/api/change")
    with page.expect_response(lambda r: "少看手机" in (r.request.post_data or "")):
        page.keyboard.press("0")
    saved(page)

    page.route("**/api/change", lambda route: route.abort())
    comment.fill("no codes")
    page.get_by_role("button", name="item-02").click()
    expect(page.locator("#message")).to_have_text(lost)
    expect(page.locator("#name")).to_have_text("item-01")  # nothing is left behind unsaved
    page.unroute("**/api/change")
    page.get_by_role("button", name="item-02").click()
    expect(page.locator("#name")).to_have_text("item-02")
    page.get_by_role("button", name="item-01").click()
    expect(comment).to_have_value("no codes")
    expect(target).to_have_value("少看手机")
    page.context.close()


def test_the_page_is_for_this_machine_and_this_page_alone(study: Study, server: PageServer) -> None:
    def status(headers: dict[str, str], body: bytes | None = None) -> int:
        path = "api/change" if body else "api/scheme"
        request = urllib.request.Request(server.url + path, body, headers)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    change = {"coder": "anna", "item": "item-01", "kind": "finish", "done": False}
    assert status({}) == 200
    assert status({"Host": "evil.example"}) == 400
    assert status({}, json.dumps(change).encode()) == 409
    assert status({"X-Coding": "1"}, json.dumps(change | {"coder": "eve"}).encode()) == 409
    assert status({"X-Coding": "1"}, json.dumps(change | {"item": "../key"}).encode()) == 409
    assert status({"X-Coding": "1"}, b"no json") == 409
