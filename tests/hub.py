"""A hub on this machine: it answers the hub's requests from a folder, so that the real loaders
download and stream.

``Hub.folder(repo)`` is where a repository's files are put; ``Hub.environment`` points a process at
the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>.+?)/resolve/[^/]+/(?P<path>.+)")
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>.+?)"
                 r"(?:/(?P<what>revision|tree|paths-info)/[^/]+(?:/(?P<path>.+))?)?")


class Hub:
    """A context manager: a server on a port of its own, for as long as the block runs."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.asked: list[str] = []
        """Method and path of every request."""
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder(self, repo: str, kind: str = "models") -> Path:
        """Where the files of a repository lie; made if missing."""
        folder = self.place / kind / repo
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """This process's environment, with the hub here and its downloads under ``home``."""
        port = self._server.server_address[1]
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home),
               "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_TELEMETRY": "1",
               "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        unwanted = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE",
                    "HF_TOKEN", "TRANSFORMERS_CACHE")
        return {name: value for name, value in os.environ.items() if name not in unwanted} | own


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.owner.asked.append(f"{self.command} {path}")
        if found := RESOLVE.fullmatch(path):
            kind = "datasets" if found["kind"] else "models"
            self._file(self.owner.place / kind / found["repo"], found["path"])
        elif found := API.fullmatch(path):
            self._listing(found, body.decode())
        else:
            self._missing("EntryNotFound")

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not folder.is_dir() or not path.is_file():
            return self._missing("EntryNotFound" if folder.is_dir() else "RepoNotFound")
        size, begin, status = path.stat().st_size, 0, 200
        end = size - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, status = int(asked[1]), min(int(asked[2] or end), end), 206
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
                   "Content-Length": str(end - begin + 1),
                   "Content-Range": f"bytes {begin}-{end}/{size}"}
        self._head(status, headers)
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(begin)
                left = end - begin + 1
                while left:
                    part = file.read(min(left, 1 << 20))
                    self.wfile.write(part)
                    left -= len(part)

    def _listing(self, asked: re.Match[str], body: str) -> None:
        folder = self.owner.place / asked["kind"] / asked["repo"]
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        below = folder / (asked["path"] or "")
        if asked["what"] == "tree":
            if not below.is_dir():
                return self._missing("EntryNotFound")
            deep = "recursive=true" in self.path.lower()
            listed = below.rglob("*") if deep else below.iterdir()
            self._json([_entry(folder, path) for path in sorted(listed)])
        elif asked["what"] == "paths-info":
            names = (json.loads(body)["paths"] if body.startswith("{")
                     else re.findall(r"paths=([^&]+)", body))
            paths = [folder / unquote(name) for name in names]
            self._json([_entry(folder, path) for path in paths if path.exists()])
        else:
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = [{"rfilename": str(path.relative_to(folder))} for path in paths]
            self._json({"id": asked["repo"], "_id": "1", "sha": COMMIT,
                        "private": False, "gated": False, "tags": [],
                        "disabled": False, "downloads": 0, "likes": 0, "siblings": files})

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(text)),
                         "X-Repo-Commit": COMMIT})
        if self.command != "HEAD":
            self.wfile.write(text)

    def _missing(self, code: str) -> None:
        self._head(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT, "Content-Length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    own = {"path": str(path.relative_to(folder)), "oid": _etag(path)}
    return own | ({"type": "directory"} if path.is_dir()
                  else {"type": "file", "size": path.stat().st_size})


def _etag(path: Path) -> str:
    """One a file and a version of it: the cache keeps files by this name."""
    told = path.stat()
    return hashlib.sha256(f"{path} {told.st_size} {told.st_mtime_ns}".encode()).hexdigest()[:40]
