"""The chat's page in a real Chromium, as people use it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from milm_ray.serving import keys
from tests.browser import CHROMIUM, TIMEOUT_MS, needs_chromium
from tests.serving.chat_model import SLOW
from tests.serving.chat_processes import ChatServer, ModelServer

pytestmark = [
    pytest.mark.slow,
    needs_chromium,
]
PHONE = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ModelServer]:
    with ModelServer(folder, pause=0.03) as server:
        yield server


@pytest.fixture(scope="module")
def chat(folder: Path, model: ModelServer) -> Iterator[ChatServer]:
    with ChatServer(str(folder / "chat.sqlite3"), model) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, chat: ChatServer) -> Iterator[Page]:
    """A page at a phone's size that fails the test on any error in it, or request elsewhere."""
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    opened, troubles = context.new_page(), []
    opened.set_default_timeout(TIMEOUT_MS)
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            request.url.startswith((chat.url, "blob:", "data:")) or troubles.append(request.url)
        ),
    )
    opened.goto(chat.url)
    yield opened
    context.close()
    assert troubles == []


def begin(page: Page) -> None:
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="开始").click()
    expect(page.get_by_label("您想说的话")).to_be_focused()


def say(page: Page, text: str) -> None:
    page.get_by_label("您想说的话").fill(text)
    page.get_by_label("您想说的话").press("Enter")


def replied(page: Page, replies: int) -> None:
    """Wait until so many replies are there, whole."""
    expect(page.locator("#log .counselor")).to_have_count(replies)
    expect(page.get_by_role("button", name="发送")).to_be_enabled()


def test_a_whole_conversation_by_keyboard(page: Page, folder: Path) -> None:
    expect(page.locator("#about")).to_contain_text("AI 程序，不是真人，不能代替医生")
    expect(page.locator("html")).to_have_attribute("lang", "zh")
    page.get_by_label("参与者编号").fill("P07")
    # From here on by keyboard only.
    page.keyboard.press("Tab")
    expect(page.get_by_role("checkbox")).to_be_focused()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("您想说的话")).to_be_focused()
    expect(page.locator("#role")).to_contain_text("改变动机")
    page.keyboard.type("我最近总是熬夜刷手机。")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("想改。")
    page.keyboard.press("Enter")
    replied(page, 1)
    expect(page.locator("#log .client")).to_have_text(re.compile("熬夜刷手机。\n想改。"))
    expect(page.locator("#log .counselor .said")).to_have_text(re.compile("第1轮"))
    page.keyboard.type("谢谢你")
    page.keyboard.press("Enter")
    replied(page, 2)
    page.get_by_role("button", name="结束会话").press("Enter")
    page.get_by_role("button", name="确定").press("Enter")
    expect(page.get_by_role("heading", name="会话结束了")).to_be_focused()
    page.get_by_role("radio", name="4").check()
    page.get_by_label("想补充的话").fill("不错")
    page.get_by_role("button", name="提交评分").click()
    expect(page.get_by_role("status")).to_have_text("评分已保存，谢谢。")
    with page.expect_download() as download:
        page.get_by_role("button", name="导出会话").click()
    download.value.save_as(folder / "session.json")
    exported = json.loads((folder / "session.json").read_text(encoding="utf-8"))
    assert exported["rating"] == 4
    assert [m["role"] for m in exported["messages"]] == ["client", "counselor"] * 2
    page.get_by_role("button", name="删除这次会话").click()
    page.get_by_role("button", name="确定").click()
    expect(page.get_by_role("heading", name="开始一次会话")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("已经删除。")
    assert page.locator("#delete-all").is_hidden()


def test_a_crisis_message_gets_help_lines_to_dial_and_no_model(
    page: Page, model: ModelServer
) -> None:
    begin(page)
    say(page, "我不想活了，已经写好遗书")
    replied(page, 1)
    notice = page.locator("#log .preset")
    expect(notice.get_by_role("alert")).to_contain_text("你的安全现在最重要")
    assert notice.get_by_role("link", name="12356").get_attribute("href") == "tel:12356"
    expect(notice.get_by_role("link", name="120")).to_be_in_viewport()
    assert model.asked("遗书") == []
    page.get_by_text("需要帮助？").click()
    expect(page.locator("#help-lines")).to_contain_text("核对")


def test_a_reload_in_mid_reply_goes_on_and_says_nothing_twice(
    page: Page, model: ModelServer
) -> None:
    begin(page)
    say(page, "慢慢来，我不急")
    expect(page.locator("#log .counselor")).to_contain_text(SLOW[2])
    page.reload()
    replied(page, 1)
    expect(page.locator("#log .counselor .said")).to_have_text("".join(SLOW))
    expect(page.locator("#log .client")).to_have_count(1)
    assert len(model.asked("我不急")) == 1


def test_a_page_closed_before_its_message_arrived_sends_it_once_when_opened_again(
    page: Page, chat: ChatServer, model: ModelServer
) -> None:
    begin(page)
    page.route("**/messages", lambda route: route.abort())
    say(page, "这句话不能丢")
    expect(page.get_by_role("status")).to_contain_text("正在重试")
    page.unroute("**/messages")
    page.reload()
    replied(page, 1)
    expect(page.locator("#log .client")).to_have_text(re.compile("这句话不能丢"))
    assert len(model.asked("这句话不能丢")) == 1


@pytest.mark.parametrize("left_by", ["开始新会话", "删除这次会话"])
def test_a_late_answer_to_a_session_that_was_left_does_not_touch_the_next(
    page: Page, left_by: str
) -> None:
    held: list[Route] = []
    begin(page)
    page.route("**/messages", lambda route: route.continue_() if held else held.append(route))
    say(page, "这句话在路上")
    expect(page.get_by_role("status")).to_contain_text("正在发送")
    for button in ("结束会话", "确定", left_by):
        page.get_by_role("button", name=button).click()
    if left_by == "删除这次会话":
        page.get_by_role("button", name="确定").click()
    begin(page)
    session = page.evaluate("localStorage['milm.session']")
    page.get_by_label("您想说的话").fill("我还在写")
    with page.expect_response(lambda response: response.status in (404, 409)):
        held[0].continue_()
    page.get_by_label("您想说的话").press("Enter")
    replied(page, 1)
    expect(page.locator("#log .client .said")).to_have_text("我还在写")
    assert page.evaluate("localStorage['milm.session']") == session


def test_a_late_deletion_of_a_session_leaves_the_next_open(page: Page) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route) if route.request.method == "DELETE" else route.continue_()

    begin(page)
    page.route("**/api/sessions/*", hold)
    with page.expect_request(lambda request: request.method == "DELETE"):
        for button in ("结束会话", "确定", "删除这次会话", "确定"):
            page.get_by_role("button", name=button).click()
    page.get_by_role("button", name="开始新会话").click()
    begin(page)
    session = page.evaluate("localStorage['milm.session']")
    with page.expect_response(lambda response: response.request.method == "DELETE"):
        held[0].continue_()
    say(page, "我还在")
    replied(page, 1)
    assert page.evaluate("localStorage['milm.session']") == session


def test_stop_and_reply_again(page: Page) -> None:
    begin(page)
    say(page, "慢一点说，停")
    expect(page.locator("#log .counselor")).to_contain_text(SLOW[0])
    page.get_by_role("button", name="停止回复").click()
    replied(page, 1)
    expect(page.locator("#log .counselor .note")).to_have_text("已停止")
    # Each button goes away when it has been pressed; the focus does not.
    expect(page.get_by_label("您想说的话")).to_be_focused()
    page.get_by_role("button", name="重新回复").press("Enter")
    expect(page.locator("#log .counselor .said")).to_have_text("".join(SLOW))
    expect(page.get_by_label("您想说的话")).to_be_focused()


def test_a_forbidden_reply_never_appears_in_the_page(page: Page) -> None:
    begin(page)
    say(page, "给我开点药吧")
    seen = ""
    while "安全提示" not in seen:
        seen = page.locator("#log").inner_text()
        assert "舍曲林" not in seen
    expect(page.locator("#log .preset")).to_contain_text("不能做诊断")


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_everything_fits_and_can_be_touched(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    for step in ("start", "chat"):
        if step == "chat":
            begin(page)
            say(page, "长" * 300)
            replied(page, 1)
            expect(page.get_by_role("button", name="发送")).to_be_in_viewport()
        root = page.locator("html")
        assert root.evaluate("node => node.scrollWidth <= node.clientWidth")
        small = page.locator("button:visible, select:visible").evaluate_all(
            "nodes => nodes.filter(n => n.offsetHeight < 44 || n.offsetWidth < 44).map(n => n.id)"
        )
        assert small == []


def test_every_control_has_a_name_and_the_language_switches(page: Page) -> None:
    for language, start in (("zh", "开始"), ("en", "Begin")):
        expect(page.locator("html")).to_have_attribute("lang", language)
        expect(page.get_by_role("button", name=start, exact=True)).to_be_visible()
        unnamed = page.locator("input, select, textarea").evaluate_all(
            "nodes => nodes.filter(n => !n.labels.length).map(n => n.id)"
        )
        assert unnamed == []
        page.get_by_role("button", name="English" if language == "zh" else "中文").click()
    assert page.locator("#log").get_attribute("aria-live") == "polite"


def test_the_page_may_load_and_run_nothing_but_its_own(page: Page, chat: ChatServer) -> None:
    response = page.request.get(chat.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', response.text()) == []


def test_a_key_is_asked_for_once(browser: Browser, folder: Path, model: ModelServer) -> None:
    file = folder / "keys.json"
    secret = keys.add(file, "study")
    with ChatServer(str(folder / "keyed.sqlite3"), model, keys_file=str(file)) as server:
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(server.url)
        page.get_by_label("访问密钥").fill("wrong")
        page.get_by_role("button").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("访问密钥").fill(secret)
        page.get_by_role("button").click()
        begin(page)
        say(page, "你好")
        replied(page, 1)
        assert secret not in str(page.evaluate("JSON.stringify(localStorage) + document.cookie"))
        page.close()


def test_a_chat_server_that_dies_and_comes_back_is_waited_for(
    browser: Browser, folder: Path, model: ModelServer
) -> None:
    place = str(folder / "reborn.sqlite3")
    with ChatServer(place, model) as first:
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(first.url)
        begin(page)
        say(page, "慢慢说给我听，停")
        expect(page.locator("#log .counselor")).to_contain_text(SLOW[1])
        first.kill()
    expect(page.get_by_role("status")).to_contain_text("正在重试")
    with ChatServer(place, model, port=first.port):
        replied(page, 1)
        expect(page.locator("#log .counselor .said")).to_have_text("".join(SLOW))
        expect(page.locator("#log .client")).to_have_count(1)
        page.close()
