"""A hub and a package index on loopback, that can fail as the real ones and the networks before them do."""

import hashlib
import http.server
import json
import re
import threading
import time
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
LOGIN = b"<!DOCTYPE html>\n<html><body>Please <a href='login'>log in</a> to this network.</body></html>"


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers as `self.server.fault` says where the path matches `self.server.where`, else as the subclass does.

    Faults: (status, headers) refuses; `page` is a network's log-in; `half` ends the connection in the middle of a
    file; `loop` redirects to itself; `slow` answers when the test is over.
    """

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        self.server.requests.append((self.path, self.headers.get("authorization")))
        fault = self.server.fault if re.search(self.server.where, self.path) else None
        if isinstance(fault, tuple):
            return self.say(fault[0], b"", fault[1], body=body)
        if fault == "page":
            return self.say(200, LOGIN, {"Content-Type": "text/html"}, body=body)
        if fault == "loop":
            return self.say(302, b"", {"Location": self.path}, body=body)
        if fault == "slow":
            self.server.over.wait(30)
        status, content, headers = self.answer()
        if fault == "half" and body and len(content) > 100:
            headers |= {"Content-Length": str(len(content))}
            content = content[: len(content) // 2]
            self.close_connection = True
        self.say(status, content, headers, body=body)

    def say(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Hub(Faulty):
    """As much of the hub's interface as a pinned download needs, over the files of `self.server.files`."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        if self.server.refusal:
            status, code = self.server.refusal
            return status, b"", {"X-Error-Code": code, "X-Error-Message": "refused"}
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if "/api/" in self.path:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in self.server.files.items()]
            tree = [{"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in self.server.files.items()]  # fmt: skip
            answer = tree if "/tree/" in self.path else {"id": "a/b", "sha": REVISION, "siblings": siblings}
            content = json.dumps(answer).encode()
        elif name in self.server.files:
            content = self.server.files[name]
        else:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": REVISION}


class Index(Faulty):
    """A package index (PEP 503) of the wheels in `self.server.files`."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        name = self.path.rpartition("/")[2]
        if name in self.server.files:
            return 200, self.server.files[name], {"Content-Type": "application/octet-stream"}
        project = self.path.rstrip("/").rpartition("/")[2].replace("-", "_")
        links = [f'<a href="/files/{file}">{file}</a>' for file in self.server.files if file.startswith(project + "-")]  # fmt: skip
        if not links:
            return 404, b"", {}
        page = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>"
        return 200, page.encode(), {"Content-Type": "text/html"}


def _start(handler: type[Faulty]) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.files, server.requests, server.refusal = {}, [], None
    server.fault, server.where, server.over = None, "", threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def start_hub() -> http.server.ThreadingHTTPServer:
    """Serve `.files` (bytes by name) as the one repository there is; `.refusal` refuses, `.requests` remembers."""
    return _start(Hub)


def start_index() -> http.server.ThreadingHTTPServer:
    """Serve `.files` (wheels by name); its pages are below /simple."""
    return _start(Index)


def use_hub(server: http.server.ThreadingHTTPServer, cache: Path, monkeypatch) -> None:
    """Let the libraries of this process ask this hub; they read its address when they are imported."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    from datasets import config
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def without_waiting(monkeypatch) -> None:
    """Let the hub's library try again at once: it waits for seconds, or as long as a hub asks it to."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    impatient = type("time", (), {"sleep": staticmethod(lambda seconds: None), "time": time.time})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
