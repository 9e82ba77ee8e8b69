"""The page for people: how its files are served, and what they may do."""

import re

import pytest

from quartet.http_gateway.admin import web_page
from quartet.http_gateway.http.auth import Access
from tests.unit.http_gateway.harness import asynchronous, served

LARGEST = 200 << 10  # bytes of all files together
PATHS = ["/", *(f"/page/{name}" for name in web_page.files() if name != web_page.INDEX)]


@pytest.mark.parametrize("path", PATHS)
@asynchronous
async def test_every_file_is_served_without_a_key_and_with_its_policy(path: str) -> None:
    async with served(api_key="k") as server:
        answer = await server.client.get(path)
    file = web_page.files()[path.removeprefix("/page/") if path != "/" else web_page.INDEX]
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, file.content, file.media_type)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"


@asynchronous
async def test_a_file_that_the_browser_has_is_not_sent_again() -> None:
    async with served() as server:
        first = await server.client.get("/page/app.js")
        for tags in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
            again = await server.client.get("/page/app.js", headers={"if-none-match": tags})
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        changed = await server.client.get("/page/app.js", headers={"if-none-match": '"of an older version"'})
        assert (changed.status, changed.body) == (200, first.body)


@pytest.mark.parametrize(
    "name", ["nope.js", "__init__.py", "docs.html", "index.html", "..%2finfo.py", ".", "..", "%2e%2e/info.py"]
)
@asynchronous
async def test_nothing_else_can_be_had_there(name: str) -> None:
    async with served() as server:
        assert (await server.client.get(f"/page/{name}")).status == 404


@asynchronous
async def test_the_page_is_not_served_under_a_name_that_somebody_else_has_chosen() -> None:
    """Else their pages could read the user's conversations, and send requests as this page does."""
    async with served() as server:
        assert (await server.client.get("/", headers={"host": "rebound.example:30000"})).status == 403


def test_all_files_together_are_small() -> None:
    assert sum(len(file.content) for file in web_page.files().values()) <= LARGEST


def test_the_files_lead_nowhere_but_to_each_other() -> None:
    """The one address of elsewhere is the name of SVG, which nobody loads."""
    for name, file in web_page.files().items():
        text = file.content.decode()
        assert set(re.findall(r"https?://[\w.]+[\w/.]*", text)) <= {"http://www.w3.org/2000/svg"}, name
        for target in re.findall(r'(?:src|href)[=:] ?"(page/[^"]+)"|from "\./([^"]+)"', text):
            assert "".join(target).removeprefix("page/") in web_page.files(), (name, target)


def test_no_string_is_ever_read_as_html_or_code() -> None:
    html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|setHTML"
    code = r"\beval\(|new Function|(?<!#)\bimport\("
    for name, file in web_page.files().items():
        assert not re.search(f"{html}|{code}", file.content.decode()), name


def test_the_document_has_no_code_of_its_own() -> None:
    text = web_page.files()[web_page.INDEX].content.decode()
    assert re.findall(r"<script[^>]*>(.*?)</script>", text) == ["", ""]
    assert not re.search(r"<style|\sstyle=|\son\w+=", text)


def test_files_are_open_and_change_nothing() -> None:
    for endpoint in web_page.ENDPOINTS:
        assert endpoint.access is Access.PUBLIC and not endpoint.changes_state
        assert set(endpoint.methods) <= {"GET", "HEAD"}
