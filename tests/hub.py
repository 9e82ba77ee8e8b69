"""A small stand-in of the Hugging Face hub: what `snapshot_download` asks for, from a dictionary of files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"

Repositories = Mapping[str, Mapping[str, bytes]]  # id → path → content


class Handler(BaseHTTPRequestHandler):
    """/api/models/ID/revision/main and /ID/resolve/REVISION/PATH. A repository named gated/… wants a token."""

    protocol_version = "HTTP/1.1"
    repositories: Repositories = {}
    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(name)
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if name.startswith("gated/"):
            return self.refuse(403, "GatedRepo")
        if not path.startswith("/api/"):
            return self.send_file(files, "/".join(rest[2:]), with_body)
        if rest and rest[0] == "revision" and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if rest and rest[0] == "tree":
            entries = [{"type": "file", "path": f, "size": len(b), "oid": oid(b)} for f, b in files.items()]
            return self.send_json(entries)
        siblings = [{"rfilename": file, "size": len(body)} for file, body in files.items()]
        return self.send_json({"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings})

    def send_file(self, files: Mapping[str, bytes], file: str, with_body: bool) -> None:
        if file not in files:
            return self.refuse(404, "EntryNotFound")
        body = files[file]
        return self.send(body, {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT}, with_body=with_body)

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send(self, body: bytes, headers: Mapping[str, str], status: int = 200, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def serving(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and what it is asked for."""
    handler = type("Hub", (Handler,), {"repositories": repositories, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
    finally:
        server.shutdown()
        server.server_close()
