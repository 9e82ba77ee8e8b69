"""The server's page in a headless Chromium, as tests look at it: what is typed, what is seen, what was asked for."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
WAIT_MS = 30_000
ASKING = "**/v1/chat/completions"
FORBIDDEN = ("Content Security Policy", "Trusted", "Refused to")  # in the console, where the page breaks its own policy

expect.set_options(timeout=WAIT_MS)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, which is closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One visitor with a browser profile of its own, who has opened the page."""

    def __init__(
        self, browser: Browser, url: str, key: str | None = None, model_info: Any = None, **options: Any
    ) -> None:
        """`key`: is known to the page already; `model_info`: what /model_info says, instead of what it would;
        `options`: of the browser's context."""
        self.url = url
        self.asked: list[Any] = []  # bodies of the requests for answers
        self.addresses: list[str] = []  # of all requests
        self.complaints: list[str] = []  # of the browser: broken policies, errors that nobody caught
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        self.context.set_default_timeout(WAIT_MS)
        if key is not None:
            self.context.add_init_script(f"sessionStorage.setItem('quartet.key', {json.dumps(key)})")
        self.page: Page = self.context.new_page()
        self.page.on("request", self._note_request)
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        if model_info is not None:
            self.page.route("**/model_info", lambda route: route.fulfill(json=model_info))
        self.page.goto(url)
        expect(self.page.locator("#messages > *").first).to_be_attached()  # it has read what the browser keeps

    def _note_request(self, request: Request) -> None:
        self.addresses.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(request.post_data_json)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error" and any(word in message.text for word in FORBIDDEN):
            self.complaints.append(message.text)

    def leave(self) -> None:
        """Close the page. It must have asked nobody but its own server, and broken no policy."""
        self.context.close()
        assert self.complaints == []
        assert [address for address in self.addresses if not address.startswith((self.url, "blob:"))] == []

    # what the visitor does

    def say(self, text: str) -> None:
        expect(self.page.locator("#messages > *").first).to_be_visible()  # the page is there
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def make_long(self, tokens: int) -> None:
        """Answers have so many tokens, the most likely ones, whatever the model thinks of an end."""

        def lengthen(route: Route) -> None:
            body = route.request.post_data_json
            route.continue_(post_data=json.dumps({"max_tokens": tokens, **body, "ignore_eos": True, "temperature": 0}))

        self.page.route(ASKING, lengthen)

    def answer_with(self, deltas: list[dict[str, Any]], reason: str = "stop", whole: bool = True) -> None:
        """The next answers are these, from nobody's model; not `whole`: the connection ends before them."""
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        if whole:
            choices.append({"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason})
        events = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)
        body = events + "data: [DONE]\n\n" if whole else events
        self.page.route(ASKING, lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))

    def add(self, *conversations: dict[str, Any]) -> None:
        """Import conversations, as from a file."""
        content = json.dumps({"format": "quartet-conversations-1", "conversations": conversations}).encode()
        file = {"name": "conversations.json", "mimeType": "application/json", "buffer": content}
        self.page.set_input_files("#import-file", file)
        for conversation in conversations:
            expect(self.page.locator(".conversations .pick", has_text=conversation["title"])).to_be_visible()

    def open(self, title: str) -> None:
        self.page.locator(".conversations .pick", has_text=title).click()

    # what the visitor sees

    @property
    def questions(self) -> Any:
        return self.page.locator(".message.user .bubble")

    @property
    def answers(self) -> Any:
        return self.page.locator(".message.assistant")

    @property
    def texts(self) -> Any:
        """The rendered texts of the answers."""
        return self.page.locator(".message.assistant .markdown")

    def answer(self, number: int) -> str:
        """The text of an answer, once it is complete."""
        message = self.answers.nth(number)
        expect(message).to_have_attribute("aria-busy", "false")
        return message.locator(".content:visible").inner_text()

    def kept(self) -> list[Any]:
        """All conversations, as the page exports them."""
        with self.page.expect_download() as download:
            self.page.click("#export")
        return json.loads(Path(download.value.path()).read_text())["conversations"]

    def background(self) -> int:
        """How light the page is, from 0 to 255."""
        colour = self.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    def overflows(self) -> list[str]:
        """What reaches beyond the right edge of the window and makes the page wider."""
        return self.page.evaluate(
            """() => [document.documentElement, ...document.querySelectorAll("main, .scroll, .messages, .server-inner")]
                .filter((element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)
                .map((element) => `${element.className || element.tagName}: ${element.scrollWidth}`)"""
        )


def conversation(title: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A conversation of one question and one answer, as it stands in a file; `more`: of the answer."""
    said = {"text": answer, "reasoning": "", "calls": [], "tokens": [], "state": "done", "finish": "stop", "stats": {}}
    messages = [
        {"role": "user", "text": question},
        {"role": "assistant", "versions": [{**said, **more}], "active": 0},
    ]
    name = f"c-{abs(hash(title)):x}"
    return {"id": name, "title": title, "created": 1, "updated": 1, "settings": {}, "messages": messages}
