"""The page at / in a real browser, on a real server with the demo model and a key."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

pytest.importorskip("playwright", reason="the page is tested with Playwright: pip install 'quartet-serve[test]'")

from playwright.sync_api import Browser, expect

from tests.ring.browser import CHROMIUM, Visit, chromium, conversation
from tests.servers import ROOT, Server

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}, Debian's package chromium")

KEY = "right"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
WAIT_S = 120
LONG = 400  # tokens
SLOW_STEP_S = 0.02  # so that an answer of that length takes longer than a browser that has little of the processor
IMAGES = ROOT / "docs" / "images"
WANTS_IMAGES = bool(os.environ.get("QUARTET_SCREENSHOTS"))  # write them anew
MOST_IMAGE_BYTES = 150 << 10
CITY = {"type": "string", "maxLength": 12}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}

HOSTILE = """<script>document.title = "broken"</script>
<img src=x onerror="document.title = 'broken'">

[click](javascript:document.title='broken') [data](data:text/html,broken) ![pixel](https://elsewhere.example/pixel.png)
<https://elsewhere.example/a> [good](https://elsewhere.example/b) [file](file:///etc/passwd)

```html
</code></pre><script>document.title = "broken"</script>
```
| <b>bold</b> | `<i>` |
|---|---|
| <svg onload=alert(1)> | x |
"""
EXAMPLE_TEXT = """A **generator expression** is short and needs no second list:

```python
def sum_of_squares(numbers):
    \"\"\"The sum of n * n.\"\"\"
    return sum(n * n for n in numbers)  # nothing is kept

print(sum_of_squares([1, 2, 3]))  # 14
```

| way | time for 10,000 numbers | memory |
|---|---:|---|
| generator | 0.61 ms | constant |
| list comprehension | 0.52 ms | one list |
| `numpy.dot` | 0.01 ms | one array |

1. Take the generator where the list is short.
2. Take `numpy` where the numbers are an array already.

> Measure before you choose: the difference seldom matters.
"""
EXAMPLE = conversation(
    "Sum the squares of a list",
    "How do I sum the squares of a list in Python, and how fast is each way?",
    EXAMPLE_TEXT,
    stats={"prompt": 31, "completion": 168, "firstMs": 42, "totalMs": 1386},
)
WIDE = f"""## Numbers

| {" | ".join(f"column number {i}" for i in range(12))} |
|{"---|" * 12}
| {" | ".join(str(i) * 9 for i in range(12))} |

```
{"a line of code that is far too long for a phone " * 6}
```

{"w" * 300}
"""


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    flags = ("--model-path", "demo", "--dtype", "float32", "--api-key", KEY)
    greedy = ("--preferred-sampling-params", '{"temperature": 0}')  # else an answer is now and then another one
    return launch_for_module(*flags, *greedy)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Callable[..., Visit]]:
    """Open the page. At the end it must have asked nobody but its server, and broken no policy."""
    visits: list[Visit] = []

    def begin(key: str | None = KEY, **options: Any) -> Visit:
        visits.append(Visit(browser, server.url, key, **options))
        return visits[-1]

    yield begin
    for one in visits:
        one.leave()


def image(visit: Visit, name: str) -> None:
    """Write a picture for the documentation, where it is wanted."""
    if WANTS_IMAGES:
        IMAGES.mkdir(exist_ok=True)
        visit.page.mouse.move(640, 660)
        visit.page.screenshot(path=IMAGES / f"{name}.png")


def api(server: Server, path: str, body: Any) -> Any:
    return requests.post(server.url + path, json=body, headers=AUTHORIZATION, timeout=WAIT_S).json()


@contextlib.contextmanager
def slow_steps(server: Server) -> Iterator[None]:
    """Every step takes longer; a scheduler that is started again meanwhile is as quick as ever."""
    api(server, "/slow_down", {"forward_sleep_time": SLOW_STEP_S})
    try:
        yield
    finally:
        api(server, "/slow_down", {"forward_sleep_time": None})


# talking


def test_a_conversation_is_streamed_and_outlasts_a_reload(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="What is the capital of Kenya?").click()
    assert seen.answer(0) == "The capital of Kenya is Nairobi."
    seen.say("What is the capital of Peru?")
    assert seen.answer(1) == "The capital of Peru is Lima."
    assert [message["role"] for message in seen.asked[1]["messages"]] == ["user", "assistant", "user"]
    seen.page.reload()
    assert [seen.answer(0), seen.answer(1)] == ["The capital of Kenya is Nairobi.", "The capital of Peru is Lima."]
    assert seen.questions.all_inner_texts() == ["What is the capital of Kenya?", "What is the capital of Peru?"]
    seen.page.get_by_role("button", name="New chat").click()
    expect(seen.answers).to_have_count(0)
    seen.open("What is the capital of Kenya?")
    expect(seen.answers).to_have_count(2)


def test_esc_stops_an_answer_which_can_go_on_later(visit: Callable[..., Visit], server: Server) -> None:
    seen = visit()
    seen.make_long(LONG)
    with slow_steps(server):
        seen.say("Tell me a story.")
        expect(seen.texts).not_to_be_empty()
        seen.page.keyboard.press("Escape")
        stopped = seen.answer(0)
    assert stopped and "Stopped." in seen.answers.inner_text()
    idle = requests.get(f"{server.url}/flush_cache?timeout=30", headers=AUTHORIZATION, timeout=WAIT_S)
    assert idle.status_code == 200  # nothing runs any more
    seen.page.unroute_all()
    seen.page.get_by_role("button", name="Continue").click()
    assert seen.answer(0).startswith(stopped)
    assert seen.asked[-1]["continue_final_message"] and seen.asked[-1]["messages"][-1]["role"] == "assistant"


def test_a_question_can_be_edited_and_an_answer_regenerated(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.say("What is the capital of Kenya?")
    seen.answer(0)
    seen.questions.hover()
    seen.page.get_by_role("button", name="Edit and send again").click()
    seen.page.fill(".edit-area", "What is the capital of France?")
    seen.page.get_by_role("button", name="Send", exact=True).first.click()
    assert seen.answer(0) == "The capital of France is Paris."
    expect(seen.questions).to_have_text(["What is the capital of France?"])
    seen.page.get_by_role("button", name="Regenerate").click()
    expect(seen.page.locator(".versions")).to_contain_text("2 / 2")
    seen.page.get_by_role("button", name="Previous version").click()
    expect(seen.page.locator(".versions")).to_contain_text("1 / 2")
    assert seen.answer(0) == "The capital of France is Paris."


def test_settings_reach_the_server_and_shape_the_answer(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    page.get_by_role("button", name="Settings of this conversation").click()
    page.fill("#setting-schema", "{")
    expect(page.locator("#setting-schema-about")).to_contain_text("is not valid JSON")
    seen.say("What is the capital of Kenya?")
    expect(seen.answers).to_have_count(0)  # not sent before that is mended
    page.fill("#setting-schema", json.dumps(SCHEMA))
    page.fill("#setting-system", "Be brief.")
    page.fill("#setting-temperature", "0")
    page.fill("#setting-stop", "never\\n\nsaid")
    page.check("#setting-logprobs")
    page.fill("#setting-top_logprobs", "2")
    seen.page.press("#prompt", "Enter")
    seen.answer(0)
    body = seen.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["stop"], body["top_logprobs"]) == (0, ["never\n", "said"], 2)
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    token = page.locator(".token").first
    assert 0 < float(token.evaluate("token => token.style.getPropertyValue('--p')")) <= 1
    page.get_by_role("group", name="Tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(token).to_be_focused()
    expect(page.locator(".token-about")).to_contain_text("most likely")
    assert page.locator(".token-about").inner_text().count("%") == 3  # its own, and the two best
    page.get_by_role("button", name="Show tokens by their probability").click()
    assert list(json.loads(seen.texts.locator("pre").inner_text())) == ["city"]


def test_what_the_server_refuses_is_told_and_can_be_tried_again(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Settings of this conversation").click()
    seen.page.fill("#setting-max_tokens", "100000")
    seen.say("What is the capital of Kenya?")
    expect(seen.page.get_by_role("alert")).to_contain_text("max_tokens is too large")
    seen.page.fill("#setting-max_tokens", "")
    seen.page.get_by_role("button", name="Try again").click()
    assert seen.answer(0) == "The capital of Kenya is Nairobi."
    expect(seen.page.locator(".versions")).to_have_count(0)


def test_thoughts_are_folded_and_tool_calls_are_shown_and_answered(visit: Callable[..., Visit]) -> None:
    seen = visit()
    function = {"name": "weather", "arguments": '{"city":'}
    call = {"id": "call-1", "index": 0, "type": "function", "function": function}
    more = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    thought = {"reasoning_content": "Somebody asks for the weather."}
    seen.answer_with([thought, {"content": "I look."}, {"tool_calls": [call]}, {"tool_calls": [more]}], "tool_calls")
    seen.say("How is the weather in Oslo?")
    expect(seen.page.locator(".thought-text")).to_be_hidden()
    seen.page.locator(".thought summary").click()
    expect(seen.page.locator(".thought-text")).to_have_text("Somebody asks for the weather.")
    expect(seen.page.get_by_role("region", name="Call of weather")).to_contain_text('"city": "Oslo"')
    seen.page.get_by_label("Result of weather").fill("rain")
    seen.answer_with([{"content": "It rains."}])
    seen.page.get_by_role("button", name="Send the results").click()
    assert seen.answer(1) == "It rains."
    called, result = seen.asked[1]["messages"][1:]
    assert called["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo"}'}
    assert result == {"role": "tool", "tool_call_id": "call-1", "name": "weather", "content": "rain"}


def test_what_was_said_in_another_tab_is_seen_before_one_goes_on(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.say("What is the capital of Kenya?")
    seen.answer(0)
    other = seen.context.new_page()
    other.goto(seen.url)
    expect(other.locator(".message.assistant")).to_contain_text("Nairobi")
    seen.say("What is the capital of Peru?")
    seen.answer(1)
    other.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")  # as when it is looked at again
    expect(other.locator(".message.assistant")).to_have_count(2)


def test_conversations_are_renamed_and_deleted_for_good(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.add(EXAMPLE, conversation("other", "a", "b"))
    seen.page.locator(".conversations li", has_text="other").hover()
    seen.page.get_by_role("button", name="Rename “other”").click()
    seen.page.get_by_role("textbox", name="Title").fill("<b>new</b>")
    seen.page.keyboard.press("Enter")
    expect(seen.page.locator(".conversations")).to_contain_text("<b>new</b>")
    seen.page.get_by_role("button", name="Delete “<b>new</b>”").click()
    seen.page.get_by_role("button", name="Delete", exact=True).click()
    expect(seen.page.locator(".conversations li")).to_have_count(1)  # it is listed until it is deleted
    seen.page.reload()
    expect(seen.page.locator(".conversations .pick")).to_have_text(EXAMPLE["title"])


def test_a_conversation_that_is_saved_while_it_is_deleted_stays(visit: Callable[..., Visit]) -> None:
    seen = visit()
    listed = seen.page.evaluate(
        """async (conversation) => {
            const { Store } = await import(new URL("page/store.js", document.baseURI).href);
            const store = new Store();
            await store.open();
            await store.save(conversation);
            await Promise.all([store.remove(conversation.id), store.save(conversation)]);
            const now = store.list().length;
            await store.open();
            return [store.lasting, now, store.list().length];
        }""",
        conversation("other", "a", "b"),
    )
    assert listed == [True, 1, 1]


# Markdown

PIECES = {
    "a *b* **c** ***d*** _e_ ~~f~~": "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <em>e</em> "
    "<del>f</del></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "**not closed and `code`": "<p>**not closed and <code>code</code></p>",
    r"\*no\* `` a`b ``": "<p>*no* <code>a`b</code></p>",
    "# One\ntwo\nthree": '<h3 class="level-1">One</h3><p>two<br>three</p>',
    "2026. was\n2027. will be": '<ol class="tight" start="2026"><li><p>was</p></li><li><p>will be</p></li></ol>',
    "in\n2026. it was": "<p>in<br>2026. it was</p>",
    "- a\n  - b\n- [x] c": '<ul class="tight"><li><p>a</p><ul class="tight"><li><p>b</p></li></ul></li>'
    '<li class="task"><input type="checkbox" disabled="" checked="" aria-label="done"><p>c</p></li></ul>',
    "1. a\n\n   b\n2. c": '<ol class="loose"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "> a\n> - b\n\n---": '<blockquote><p>a</p><ul class="tight"><li><p>b</p></li></ul></blockquote><hr>',
    "a\n- b\n\nc": '<p>a</p><ul class="tight"><li><p>b</p></li></ul><p>c</p>',
    "<b>x</b> &amp;": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    "[a](javascript:x) [b](//c)": "<p>[a](javascript:x) [b](//c)</p>",
}
COSTLY = [
    "*a ",
    "_a*b ",
    "[",
    "[](",
    "[a](b",
    "`",
    "``a`",
    "> ",
    "- ",
    "  - ",
    "| ",
    "|\n",
    "a|b\n-|-\n",
    "~~a",
    "\\",
    "<",
]
ADDRESSES = [
    "https://a.example/b?c=d",
    "(https://a.example/b).",
    "<https://a.example/b>",
    '[t](https://a.example/b "u")',
]


def test_markdown_becomes_the_elements_that_it_means(visit: Callable[..., Visit]) -> None:
    seen = visit()
    found = seen.page.evaluate(
        """async (texts) => {
            const { markdown } = await import("/page/markdown.js");
            return texts.map((text) => markdown(text).map((node) => node.outerHTML).join(""));
        }""",
        [*PIECES, *ADDRESSES],
    )
    assert dict(zip(PIECES, found, strict=False)) == PIECES
    links = [re.findall(r'<a href="([^"]*)"', text) for text in found[len(PIECES) :]]
    assert links == [["https://a.example/b?c=d"], *[["https://a.example/b"]] * 3]


def test_markdown_that_grows_looks_like_the_whole_at_each_step(visit: Callable[..., Visit]) -> None:
    seen = visit()
    differing = seen.page.evaluate(
        """async (text) => {
            const { markdown, MarkdownView } = await import("/page/markdown.js");
            const root = document.createElement("div");
            const view = new MarkdownView(root);
            const differing = [];
            for (let end = 0; end <= text.length + 3; end += 3) {
                const part = text.slice(0, end);
                view.update(part);
                const whole = document.createElement("div");
                whole.append(...markdown(part));
                if (root.innerHTML !== whole.innerHTML) differing.push(part.slice(-40));
            }
            return differing;
        }""",
        EXAMPLE_TEXT + WIDE + HOSTILE + "\n\n".join(PIECES),
    )
    assert differing == []


def test_markdown_made_to_be_costly_is_rendered_and_is_not_deep(visit: Callable[..., Visit]) -> None:
    seen = visit()
    deepest = seen.page.evaluate(
        """async (pieces) => {
            const { markdown } = await import("/page/markdown.js");
            const depth = (node) => {
                let most = 0;
                for (let [at, level] = [node, 0]; at; ) {
                    most = Math.max(most, level);
                    if (at.firstChild) [at, level] = [at.firstChild, level + 1];
                    else {
                        while (at && at !== node && !at.nextSibling) [at, level] = [at.parentNode, level - 1];
                        at = at === node ? null : at?.nextSibling;
                    }
                }
                return most;
            };
            const text = (piece) => piece.repeat(30_000 / piece.length);
            const texts = [...pieces.map(text), "*a ".repeat(150_000), "~".repeat(99_999) + "`", "\\t".repeat(99_999)];
            return texts.map((text) => markdown(text).map(depth).reduce((most, one) => Math.max(most, one), 0));
        }""",
        [*COSTLY, "*_"],
    )
    assert max(deepest) <= 60, dict(zip(COSTLY, deepest, strict=False))


# texts that are not to be trusted


def test_hostile_markdown_stays_text(visit: Callable[..., Visit]) -> None:
    seen = visit()
    seen.add(conversation("<img src=x onerror=alert(1)>", HOSTILE, HOSTILE))
    seen.open("<img")
    content = seen.texts
    assert "<script>" in content.inner_text() and "onerror" in content.inner_text()
    inside = "#messages :is(script, img, svg:not(.icon), iframe, b, i:not(.dots i)), [onerror], [onload]"
    expect(seen.page.locator(inside)).to_have_count(0)
    links = content.locator("a")
    addresses = [f"https://elsewhere.example/{name}" for name in ("pixel.png", "a", "b")]
    assert [link.get_attribute("href") for link in links.all()] == addresses
    assert all("noopener" in (link.get_attribute("rel") or "") for link in links.all())
    assert "broken" not in seen.page.title()
    with pytest.raises(Exception, match="TrustedHTML"):
        seen.page.evaluate("() => { document.body.innerHTML = '' }")
    seen.complaints.clear()  # about that attempt


def test_a_file_that_is_no_export_adds_nothing(visit: Callable[..., Visit]) -> None:
    seen = visit()
    good = conversation("good", "a", "b")
    bad = [{**good, "messages": [{"role": "user"}]}, {**good, "id": "../x"}, {**good, "title": 1}]
    files = [{"format": "other"}, *({"format": "quartet-conversations-1", "conversations": [good, one]} for one in bad)]
    for number, said in enumerate(files):
        content = {"name": f"{number}.json", "mimeType": "application/json", "buffer": json.dumps(said).encode()}
        seen.page.set_input_files("#import-file", content)
        expect(seen.page.locator("#hint")).to_contain_text("The file was not taken")
        seen.page.evaluate("() => { document.getElementById('hint').textContent = '' }")
    assert seen.kept() == []
    seen.add(good)
    [kept] = seen.kept()
    assert kept["messages"][0] == good["messages"][0] and kept["title"] == "good"


def test_an_import_keeps_what_is_there_beside_what_has_changed(visit: Callable[..., Visit]) -> None:
    seen = visit()
    here = conversation("shared", "a", "here")
    elsewhere = {**here, "title": "its other half", "messages": conversation("shared", "a", "elsewhere")["messages"]}
    seen.add(here)
    seen.add(here)
    expect(seen.page.locator("#hint")).to_contain_text("0 conversations were added")
    seen.add(elsewhere)
    expect(seen.page.locator("#hint")).to_contain_text("1 conversation was added")
    kept = seen.kept()
    assert sorted(one["messages"][1]["versions"][0]["text"] for one in kept) == ["elsewhere", "here"]
    assert len({one["id"] for one in kept}) == 2


# keys


def test_a_wrong_key_is_refused_and_the_right_one_is_kept_in_the_tab(visit: Callable[..., Visit]) -> None:
    seen = visit(key=None)
    dialog = seen.page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server wants a key")
    seen.page.get_by_role("button", name="Cancel").click()
    expect(seen.page.locator("#status")).to_contain_text("A key is needed")
    seen.say("Is a key needed?")
    seen.page.fill("#key-input", "wrong")
    seen.page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server does not take this key.")
    image(seen, "page-key")
    seen.page.fill("#key-input", KEY)
    seen.page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    assert seen.answer(0)
    seen.page.reload()
    seen.say("What is the capital of Peru?")
    assert seen.answer(1)
    assert KEY not in json.dumps(seen.kept())


# deaths


def test_a_text_goes_on_when_the_scheduler_dies_under_it(visit: Callable[..., Visit], server: Server) -> None:
    long = {"ignore_eos": True, "max_tokens": LONG, "temperature": 0}
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], **long}
    expected = api(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    seen = visit()
    seen.make_long(LONG)
    with slow_steps(server):
        seen.say("Tell me a story.")
        expect(seen.texts).not_to_be_empty()
        start = len(server.log)
        server.children()["scheduler"].kill()
        server.wait_for_match("The scheduler was started again; 1 of 1 requests", start)
    seen.answer(0)
    [kept] = seen.kept()
    [answer] = kept["messages"][1]["versions"]
    assert (answer["text"], answer["finish"], answer["resumed"]) == (expected, "length", 0)
    assert answer["stats"]["completion"] == LONG and len(seen.asked) == 1


def test_a_text_goes_on_when_the_gateway_dies_under_it(visit: Callable[..., Visit], server: Server) -> None:
    seen = visit()
    seen.make_long(LONG)
    content = seen.texts
    with slow_steps(server):
        seen.say("Tell me a story.")
        expect(content).not_to_be_empty()
        before = content.inner_text().rstrip()
        server.children()["gateway"].kill()
        expect(seen.answers.locator(".resumed")).to_be_visible()
    assert seen.answer(0).startswith(before) and len(seen.answer(0)) > len(before)
    assert len(seen.asked) >= 2 and seen.asked[-1]["continue_final_message"]
    [kept] = seen.kept()
    assert kept["messages"][1]["versions"][0]["finish"] == "length"


def test_an_answer_under_a_schema_that_breaks_off_is_tried_again_only_where_the_user_says_so(
    visit: Callable[..., Visit],
) -> None:
    """Its grammar would begin anew behind what is there."""
    seen = visit()
    seen.page.get_by_role("button", name="Settings of this conversation").click()
    seen.page.fill("#setting-schema", json.dumps(SCHEMA))
    seen.answer_with([{"content": '{"city": "Nai'}], whole=False)
    seen.say("What is the capital of Kenya?")
    again = seen.page.get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    expect(seen.page.get_by_role("alert")).to_contain_text("The connection ended")
    assert len(seen.asked) == 1 and "Nai" in seen.answer(0)
    seen.answer_with([{"content": '{"city": "Nairobi"}'}])
    again.click()
    expect(seen.texts).to_contain_text("Nairobi")
    assert len(seen.asked) == 2 and "continue_final_message" not in seen.asked[1]


def test_a_model_that_embeds_is_not_talked_to(visit: Callable[..., Visit]) -> None:
    info = {"model_path": "m", "served_model_name": "embedder", "is_generation": False}
    seen = visit(key=None, model_info=info)
    expect(seen.page.get_by_role("heading", name="This model serves embeddings")).to_be_visible()
    expect(seen.page.get_by_role("button", name="Send")).to_be_disabled()


def test_the_server_page_shows_load_restarts_and_new_weights(visit: Callable[..., Visit], server: Server) -> None:
    seen = visit()
    seen.page.route("**/health", lambda route: route.fulfill(json={"status": "sleeping"}))  # as when nothing was asked
    seen.page.get_by_role("link", name="Server").click()
    facts, events = seen.page.locator(".facts"), seen.page.locator(".events")
    expect(facts).to_contain_text("sleeping until somebody asks")
    seen.page.unroute_all()
    expect(facts).to_contain_text("default")
    kv = seen.page.get_by_role("region", name="KV cache in use")
    expect(kv).to_contain_text(" tokens")
    api(server, "/update_weights_from_disk", {"model_path": "demo", "weight_version": "two"})
    server.children()["detokenizer"].kill()
    expect(events).to_contain_text("The weights are now version two.")
    expect(events).to_contain_text("The detokenizer was started again.")
    expect(events).to_contain_text("The server is awake.")
    row = seen.page.locator("[data-role=detokenizer]")
    expect(row).to_contain_text("running")
    expect(row.locator(".count")).to_have_text([re.compile(r"\d %"), re.compile(r"\d MB"), "1"])
    output = seen.page.get_by_role("region", name="Output tokens per second")
    expect(output.locator(".chart-line")).to_have_attribute("d", lines_of(2))
    seen.page.get_by_role("link", name="Chat").click()
    asked = len(seen.addresses)
    seen.page.wait_for_timeout(2200)
    assert len(seen.addresses) <= asked + 3  # nobody looks, nobody asks: but for what was on its way


# how it looks


def test_on_a_phone_nothing_is_wider_than_the_screen(visit: Callable[..., Visit]) -> None:
    seen = visit(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True, device_scale_factor=1)
    page = seen.page
    page.get_by_role("button", name="Conversations").click()
    seen.add(conversation("wide", WIDE, WIDE), EXAMPLE)
    seen.open("wide")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator(".code-block")).to_be_visible()
    assert seen.overflows() == []
    page.get_by_role("button", name="Settings of this conversation").click()
    assert seen.overflows() == []
    page.get_by_role("button", name="Close the settings").click()
    seen.say("What is the capital of Kenya?")
    expect(page.locator(".message.assistant").nth(1)).to_contain_text("Nairobi")
    page.get_by_role("link", name="Server").click()
    expect(page.locator(".facts")).to_contain_text("demo")
    assert seen.overflows() == []
    page.get_by_role("link", name="Chat").click()
    page.get_by_role("button", name="Conversations").click()
    seen.open(EXAMPLE["title"])
    expect(page.locator("#sidebar")).to_be_hidden()
    image(seen, "page-phone")


def test_it_is_dark_where_the_system_is_dark_unless_the_user_says_otherwise(visit: Callable[..., Visit]) -> None:
    seen = visit(color_scheme="dark")
    seen.add(EXAMPLE)
    seen.open(EXAMPLE["title"])
    seen.page.reload()
    assert seen.background() < 60
    image(seen, "page-dark")
    button = seen.page.get_by_role("button", name="Appearance")
    button.click()
    assert seen.background() > 200
    seen.page.reload()
    assert seen.background() > 200
    image(seen, "page-chat")
    button.click()
    assert seen.background() < 60


def test_it_is_used_with_the_keyboard_and_has_names_for_everything(visit: Callable[..., Visit]) -> None:
    seen = visit()
    page = seen.page
    seen.answer_with([{"content": "The capital of Kenya is Nairobi."}])  # the model may err where lines are broken
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.type("What is the capital")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of Kenya?")
    expect(seen.answers).to_have_count(0)
    page.keyboard.press("Enter")
    assert "Nairobi" in seen.answer(0)
    expect(page.locator("#live")).to_contain_text("Nairobi")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("textbox", name="Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Skip to the message box").focus()
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("() => document.activeElement.id"))
    assert order[:4] == ["tab-chat", "tab-server", "open-settings", "new-chat"]
    nameless = page.locator("button:visible, a:visible, input:visible, textarea:visible").evaluate_all(
        """controls => controls.filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim()
            || one.labels?.length)).map((one) => one.outerHTML)"""
    )
    assert nameless == []


# pictures


@pytest.mark.skipif(not WANTS_IMAGES, reason="pictures are taken where QUARTET_SCREENSHOTS is set")
def test_pictures_of_tokens_and_of_a_busy_server(visit: Callable[..., Visit], server: Server) -> None:
    seen = visit()
    seen.page.get_by_role("button", name="Settings of this conversation").click()
    seen.page.check("#setting-logprobs")
    seen.page.evaluate("() => { document.getElementById('settings').scrollTop = 0 }")
    seen.say("Tell me a story.")
    seen.answer(0)
    image(seen, "page-tokens")
    seen.page.get_by_role("link", name="Server").click()
    prompts = [f"Tell me a story of {number}." for number in range(8)]
    for turn, count in enumerate((1, 3, 2, 8, 5, 4, 8, 6)):
        if turn == 4:
            api(server, "/update_weights_from_disk", {"model_path": "demo", "weight_version": "step-20"})
        if turn == 5:
            server.children()["tokenizer"].kill()
        params = {"ignore_eos": True, "max_new_tokens": LONG // 2}
        api(server, "/generate", {"text": prompts[:count], "sampling_params": params})
    image(seen, "page-server")


def test_images_of_the_documentation_are_small() -> None:
    images = list(IMAGES.glob("page-*.png"))
    assert images and all(image.stat().st_size <= MOST_IMAGE_BYTES for image in images)


def lines_of(points: int) -> Any:
    """What the path of a line with at least so many points looks like."""
    return re.compile(r"M[^L]+" + r"(L[^L]+)" * (points - 1))
