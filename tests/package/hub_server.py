"""A Hugging Face Hub on 127.0.0.1, as far as the clients of huggingface_hub and datasets speak with it here.

    with HubServer() as hub:
        hub.add("some/repository", "a/file.txt", b"content")
        … HF_ENDPOINT=hub.url …

Files are served as the real hub serves large ones: `resolve` redirects to another host, with the size and the
sha256 in its own headers, and that host answers ranges. Started alone, it serves the files that it is given:

    python tests/package/hub_server.py some/repository/a/file.txt=LOCAL_FILE …
"""

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "c0ffee" + 34 * "0"


class HubServer(ThreadingHTTPServer):
    """The attributes from `status` on are faults; a test sets them before or while it asks."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}  # {repository: {path: content}}
        self.log: list[tuple[str, str, str | None]] = []  # (method, path, range)
        self.status: int | None = None  # what every request is answered with
        self.html = False  # a login page answers whatever is asked
        self.break_after: list[int] = []  # bytes after which a download breaks off, one for each
        self.sent_instead: bytes | None = None  # what comes in place of a file's content
        self.silent_seconds = 0.0  # before any answer
        self.bytes_per_second = float("inf")

    def add(self, repository: str, path: str, content: bytes) -> None:
        """Serve this file of a dataset repository."""
        self.files.setdefault(repository, {})[path] = content

    def downloads(self) -> list[str | None]:
        """The ranges that were asked of file contents; None is a whole file."""
        return [part for method, path, part in self.log if method == "GET" and path.startswith("/content/")]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def _answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append((self.command, self.path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        time.sleep(hub.silent_seconds)
        if hub.html:
            self._send(200, b"<!DOCTYPE html><html>Welcome to the hotel's network</html>", "text/html")
        elif hub.status:
            self._send(hub.status, b"no")
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/content/([^/]+/[^/]+)/(.+)", path):
            content = hub.files[found[1]][found[2]] if hub.sent_instead is None else hub.sent_instead
            self._send_content(content)
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/.*)?", path):
            self._tell(found[1], found[2] or "", body)
        else:
            self._send(404, b"no such page")

    def _resolve(self, repository: str, path: str):
        content = self.server.files.get(repository, {}).get(path)
        if content is None:
            self._send(404, b"", headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.server.server_port}/content/{repository}/{path}",
        }
        self._send(302, b"", headers=headers)

    def _send_content(self, content: bytes):
        hub = self.server
        start, end = 0, len(content)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2]) + 1, end) if part[2] else end
        self.send_response(206 if part else 200)
        self.send_header("Content-Length", str(end - start))
        if part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = min(end, start + (hub.break_after.pop(0) if hub.break_after else end))
        for position in range(start, stop, 1 << 14):
            block = content[position : min(position + (1 << 14), stop)]
            self.wfile.write(block)
            time.sleep(len(block) / hub.bytes_per_second)

    def _tell(self, repository: str, what: str, body: str):
        if repository not in self.server.files:
            self._send(404, b"", headers={"X-Error-Code": "RepoNotFound"})
            return
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.server.files[repository].items()
        ]
        if what.startswith("/paths-info/"):
            answer = [file for file in files if file["path"] in parse_qs(body).get("paths", [])]
        elif what.startswith("/tree/"):
            folder = Path(*what.split("/")[3:])  # behind /tree/REVISION
            within = [file for file in files if folder in Path(file["path"]).parents]
            subfolders = {
                parent for file in within for parent in Path(file["path"]).parents if parent.parent == folder
            }
            answer = [file for file in within if Path(file["path"]).parent == folder]
            answer += [{"type": "directory", "path": str(path), "oid": COMMIT} for path in subfolders - {folder}]
        else:
            siblings = [{"rfilename": file["path"]} for file in files]
            answer = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self._send(200, json.dumps(answer).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str = "text/plain", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Print nothing."""


if __name__ == "__main__":
    with HubServer(int(sys.argv[1])) as server:
        for argument in sys.argv[2:]:
            name, _, file = argument.partition("=")
            server.add("/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]), Path(file).read_bytes())
        print(server.url, flush=True)
        try:
            while True:
                time.sleep(1)
                for entry in server.log:
                    print(*entry, flush=True)
                server.log.clear()
        except KeyboardInterrupt:
            pass
