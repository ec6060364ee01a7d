"""A hub on loopback."""

import hashlib
import http.server
import json
import threading

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a pinned download needs, over the files of `self.server.files`."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        self.server.requests.append((self.path, self.headers.get("authorization")))
        if self.server.refusal:
            status, code = self.server.refusal
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "refused")
            self.send_header("Content-Length", "0")
            return self.end_headers()
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
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def start_hub() -> http.server.ThreadingHTTPServer:
    """Serve `.files` (bytes by name) as the one repository there is; `.refusal` refuses, `.requests` remembers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refusal, server.requests = {}, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
