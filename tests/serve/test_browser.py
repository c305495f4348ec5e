"""The page in a real browser, on the real server with the real model: `apt-get install chromium`, or it is skipped."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from medusa_apar import attach
from medusa_apar.events.recording import Recording
from medusa_apar.heads import HydraHeads
from medusa_apar.serve.event_texts import EventTexts, GuessTexts
from medusa_apar.serve.page import page_files, router
from tests.support.list_writer import list_prompts, list_writer
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import ListTokenizer, tiny_tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'medusa-apar[dev]'")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's browser: apt-get install chromium")

ROOT = Path(__file__).parents[2]
QUESTION = "What are the key skills of a good leader?"
KEY = "page-key"
HTML = "<b>bold</b><img src=x onerror=alert(1)><script>alert(2)</script> & **so** on"
# Notes how long each lane's text is, picture after picture.
WATCH = """() => { window.seen = []; new MutationObserver(() => seen.push([...document.querySelectorAll(".lane")].map(
  (lane) => lane.querySelector(".said span").textContent.length))).observe(document.querySelector("#conversation"),
  {subtree: true, childList: true, characterData: true}) }"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as runs:
        browser = runs.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """What goes wrong on it fails the test: a policy that is broken, an error nobody catches, another host."""
    allowed = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(viewport={"width": 1200, "height": 850}, permissions=allowed)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: "Content Security Policy" in message.text and wrong.append(message.text))
    page.on("request", lambda its: re.match(r"http://(127\.0\.0\.1:|page\.test/)", its.url) or wrong.append(its.url))
    page.set_default_timeout(60_000)
    yield page
    context.close()
    assert not wrong


# ---- its scripts alone, against what Python makes of the same


@pytest.fixture
def scripts(page):
    """A page that has our files and no server."""

    def answer(route):
        file = page_files().get(route.request.url.rpartition("/")[2] or "index.html")
        if file is None:
            return route.fulfill(status=503)
        return route.fulfill(body=file.content, content_type=file.media_type)

    page.route("**/*", answer)
    page.goto("http://page.test/")
    return page


def recorded(model, tokenizer, prompt_ids, control=None, **options):
    heads, told = HydraHeads.random(model), []
    apar = attach(model, heads, control, tokenizer=tokenizer)
    with apar.engine(budget=24) as engine:
        engine.add(apar.request("one", prompt_ids, events=told.append, **options))
        while engine.unfinished:
            engine.step()
    return told


def recordings():
    for seed, limit in ((2, 30), (13, 80), (24, 40)):
        model, tokenizer = forking_model(seed), tiny_tokenizer()
        yield tokenizer, recorded(model, tokenizer, [7, 8, 9], CONTROL, max_new_tokens=limit)
    for ids in list_prompts(2)["input_ids"].tolist():
        yield ListTokenizer(), recorded(list_writer(), ListTokenizer(), ids, fork="lists", max_new_tokens=100)


def test_threads_are_read_as_python_reads_them(scripts):
    """At every step, rules that fork at list items and threads that take their parent's text over among it."""
    compared = 0
    for tokenizer, events in recordings():
        write = EventTexts(tokenizer, GuessTexts(tokenizer))
        written, steps = [write(event) for event in events], events[-1].step
        at = sorted({1, steps // 3, steps // 2, steps - 1, steps})
        found = scripts.evaluate(
            """async ([events, at]) => {
            const {Recording} = await import("/page/recording.js");
            return at.map((step) => {
              const its = Recording.of(events, step);
              return [its.text().map(([thread, token]) => [thread.index, token.id]), its.live.length] }) }""",
            [written, at],
        )
        for step, (text, live) in zip(at, found, strict=True):
            then = Recording.of(events).at(step)
            assert text == [[thread.index, thread.tokens[index]] for thread, index in then.text()]
            assert live == sum(thread.live for thread in then.trees[0].threads)
            compared += len(text)
    assert compared > 500


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
        ("Two:\n1. **x**: y\n\n2. z\nmore", "<p>Two:</p><ol><li><strong>x</strong>: y</li><li>z<br>more</li></ol>"),
        ("3. x\n5. y", '<ol><li value="3">x</li><li value="5">y</li></ol>'),
        ("- a\n  - b\n  - c\n- d", "<ul><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ul>"),
        ("1. a\n   - b\n2. c\n\nend", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol><p>end</p>"),
        ("# T\n`x < y` ** no **", "<h3>T</h3><p><code>x &lt; y</code> ** no **</p>"),
        ("```html\n<b>\n```\nend", "<pre><code>&lt;b&gt;\n</code></pre><p>end</p>"),
        ("<b>x</b> &amp; <script>1</script>", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;script&gt;1&lt;/script&gt;</p>"),
        ("", ""),
    ],
)
def test_lists_and_paragraphs_are_elements_and_all_else_is_text(scripts, text, html):
    script = """async (text) => { const {rendered} = await import("/page/document.js");
        const root = document.createElement("div"); root.append(rendered(text)); return root.innerHTML }"""
    assert scripts.evaluate(script, text) == html


def test_no_text_makes_the_renderer_fail_or_lose_a_word(scripts):
    script = """async (texts) => { const {rendered} = await import("/page/document.js");
        const runs = [{end: 3, hue: 1}, {end: 9, hue: 0}, {end: 1e9, hue: 2}];
        return texts.map((text) => { const root = document.createElement("div");
          root.append(rendered(text, runs)); return root.textContent }) }"""
    pieces = ["1. ", "- ", "  ", "\n", "**", "a", "b c", "`", "```", "12) ", "# ", "    - ", "<i>", "é", "🙂"]
    texts = ["".join(pieces[(seed * 7 + k * k * (seed + 3)) % len(pieces)] for k in range(14)) for seed in range(300)]
    for text, shown in zip(texts, scripts.evaluate(script, texts), strict=True):
        for word in re.findall(r"b c|<i>|é|🙂", re.sub(r"```.*", "", text)):
            assert word in shown, text


def test_a_browser_that_keeps_nothing_shows_the_page(page, scripts):
    """As one does that is set to block cookies; what was typed lasts as long as the page."""
    page.add_init_script(
        """for (const area of ["localStorage", "sessionStorage"]) {
            Object.defineProperty(window, area, {get() { throw new DOMException("", "SecurityError") }}) }"""
    )
    page.reload()
    page.locator("#server.down").wait_for()
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    had = """import("/page/wire.js").then(({setKey, hasKey}) => {
        setKey("k"); const had = hasKey(); setKey(""); return [had, hasKey()] })"""
    assert page.evaluate(had) == [True, False]


def test_a_page_that_is_mounted_elsewhere_asks_the_api_beside_it(page, scripts):
    app, asked = FastAPI(), []
    app.include_router(router(prefix=""))
    index = TestClient(app).get("/")
    assert index.text != page_files()["index.html"].content.decode()

    def models(route):
        asked.append(route.request.url)
        route.fulfill(json={"data": [{"id": "its-name"}]})

    page.route("**/apar/", lambda route: route.fulfill(body=index.content, headers=dict(index.headers)))
    page.route("**/models", models)
    page.goto("http://page.test/v1/apar/")
    page.get_by_text("its-name").wait_for()
    assert asked == ["http://page.test/v1/apar/models"]


def test_a_server_that_is_ready_and_refuses_is_not_asked_without_a_pause(page, scripts):
    asked = []
    page.route("**/health", lambda route: route.fulfill(status=200))
    page.route("**/v1/models", lambda route: (asked.append(1), route.fulfill(status=500)))
    page.clock.install()
    page.clock.pause_at("2100-01-01")
    page.reload()
    page.locator("#server.down").wait_for()
    for _ in range(5):  # as much time as several tries would take
        page.evaluate('fetch("health").then((its) => its.ok)')
    assert len(asked) == 1
    page.clock.run_for(1600)
    page.evaluate('fetch("health").then((its) => its.ok)')
    assert len(asked) == 2


# ---- the real server


@contextmanager
def serving(port=0):
    options = ["--port", str(port), "--quantize", "int8", "--api-key", KEY, "--no-access-log"]
    command = [sys.executable, "-m", "medusa_apar", "serve", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = None
        for line in process.stdout:
            address = address or (re.search(r"http://[\d.]+:\d+", line) or [None])[0]
            if line.startswith("ready"):
                break
        assert address is not None, "the server has not started"
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def served():
    with serving() as (process, address):
        yield process, address


@pytest.fixture
def server(served):
    return served[1]


@pytest.fixture
def chat(page, server):
    page.goto(server)
    unlock(page)
    return page


def unlock(page):
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Unlock").click()
    page.locator("#server.up").wait_for()


def api(server, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", data, headers), timeout=60) as answer:
        return answer.read().decode()


def content(server, messages, **fields):
    body = {"messages": messages, "temperature": 0, "max_tokens": 150, **fields}
    return json.loads(api(server, "v1/chat/completions", body))["choices"][0]["message"]["content"]


def asked(page, question, tokens=150):
    """Asks and waits for the end; the texts of the turn's answers, as the page would copy them."""
    page.locator("details:not([open]) > summary").all() and page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")
    turn = page.locator(".turn").last
    turn.locator(".answer[aria-busy=false]").last.wait_for()
    texts = []
    for answer in turn.locator(".answer").all():
        answer.locator(".tools").wait_for()
        answer.get_by_role("button", name="Copy").click()
        texts.append(page.evaluate("navigator.clipboard.readText()"))
    return texts


@pytest.mark.real
def test_lanes_grow_at_once_and_become_what_the_api_says(chat, server):
    chat.evaluate(WATCH)
    (text,) = asked(chat, QUESTION)
    first = [{"role": "user", "content": QUESTION}]
    assert text == content(server, first) and len(text) > 300
    seen = chat.evaluate("seen")
    pairs = zip(seen, seen[1:], strict=False)
    at_once = max(sum(b > a for a, b in zip(old, new, strict=False)) for old, new in pairs)
    assert at_once >= 2 and max(map(len, seen)) >= 4
    assert chat.locator(".lane").count() == 0 and chat.locator(".text ol > li, .text ul > li").count() >= 3
    assert float(chat.locator("#now-perStep").inner_text()) > 1.5
    assert "The answer is there" in chat.get_by_role("status").inner_text()

    # A second turn reads the first.
    more = "Tell me more about the first."
    with chat.expect_request("**/v1/chat/completions") as request:
        (again,) = asked(chat, more, 60)
    both = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": more}]
    assert request.value.post_data_json["messages"] == both
    assert again == content(server, both, max_tokens=60)


@pytest.mark.real
def test_beside_it_one_thread_answers_without_guesses_in_the_same_steps(chat, server):
    chat.get_by_label("Beside it").check()
    threads, one = asked(chat, QUESTION, 70)
    messages = [{"role": "user", "content": QUESTION}]
    assert threads == content(server, messages, max_tokens=70)
    assert one == content(server, messages, max_tokens=70, apar={"fork": "off"})
    assert float(chat.locator("#plain-perStep").inner_text()) <= 1 < float(chat.locator("#now-perStep").inner_text())


@pytest.mark.real
def test_stop_ends_the_request_and_keeps_what_there_is(chat, server):
    chat.get_by_text("Settings").click()
    chat.get_by_label("Most tokens").fill("4000")  # more than fit in the time below
    chat.get_by_label("Your question").fill("Write a very long story about the sea.")
    chat.get_by_role("button", name="Ask", exact=True).click()
    chat.locator(".lane .said span", has_text=re.compile(r"\w+ \w+")).first.wait_for()
    chat.keyboard.press("Escape")
    chat.get_by_text(re.compile("^Stopped")).wait_for()
    deadline = time.monotonic() + 5
    while not re.search(r"^medusa_apar:num_requests_running(\{.*\})? 0\.0$", api(server, "metrics"), re.MULTILINE):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert chat.get_by_role("button", name="Ask", exact=True).is_visible()
    assert chat.locator(".turn .text").inner_text()


@pytest.mark.real
def test_html_stays_text_in_question_and_answer(chat):
    def answer(route):
        chunk = {"choices": [{"index": 0, "delta": {"content": HTML}, "finish_reason": "stop"}]}
        route.fulfill(body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    chat.route("**/v1/chat/completions", answer)
    assert asked(chat, HTML) == [HTML]
    assert chat.locator(".text").inner_text() == HTML.replace("**", "")
    assert chat.locator(".question").inner_text().endswith(HTML)
    assert chat.locator("#conversation :is(b, img, script)").count() == 0 and chat.locator(".text strong").count() == 1


@pytest.mark.real
def test_a_link_carries_the_question_and_how_it_is_asked(chat, server):
    chat.goto(f"{server}/#q={'Why%3F%20%3Cb%3E'}&fork=off&temperature=0.5&seed=7&max_tokens=20&compare=true")
    chat.reload()
    chat.locator("#server.up").wait_for()  # the key is kept in the tab
    assert chat.get_by_label("Your question").input_value() == "Why? <b>"
    with chat.expect_request("**/v1/chat/completions") as request:
        asked(chat, "Why? <b>", 20)
    body = request.value.post_data_json
    assert (body["seed"], body["temperature"], body["apar"]["fork"]) == (7, 0.5, "off")
    chat.get_by_role("button", name="Link").click()
    chat.get_by_text("The link is copied.").first.wait_for()
    assert "q=Why%3F+%3Cb%3E" in chat.url and chat.evaluate("navigator.clipboard.readText()") == chat.url


@pytest.mark.real
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_window_and_all_has_a_name(chat, width):
    chat.set_viewport_size({"width": width, "height": 800})
    chat.get_by_label("Beside it").check()
    asked(chat, "Name three rivers.", 60)
    assert chat.evaluate("document.documentElement.scrollWidth") <= width
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea")].filter((its) =>
        its.checkVisibility() && !its.textContent.trim() && !its.labels?.[0]?.textContent.trim()).length"""
    assert chat.evaluate(nameless) == 0


@pytest.mark.real
def test_a_server_that_goes_away_is_told_and_waited_for(chat, served):
    """The last of all: the others' server is gone then."""
    process, address = served
    chat.get_by_label("Your question").fill(QUESTION)
    chat.get_by_label("Your question").press("Enter")
    chat.locator(".lane").nth(2).wait_for()
    process.send_signal(signal.SIGKILL)
    chat.get_by_text("This page goes on as soon as it is back.").wait_for()
    assert chat.locator(".turn .facts").inner_text().startswith("Broken off")
    chat.get_by_label("Your question").fill("Are you there?")
    chat.get_by_label("Your question").press("Enter")
    chat.locator("#server.down").wait_for()
    with serving(address.rpartition(":")[2]):
        chat.locator("#server.up").wait_for()
        chat.locator("#notice").wait_for(state="hidden")
        assert asked(chat, "Are you there?", 12) != [""]
