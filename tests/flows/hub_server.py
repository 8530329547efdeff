"""A tiny hub on this machine: it speaks as much as a download of a model asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "owner/tiny"
COMMIT = "c0ffee" * 6 + "abcd"
LARGE = (".safetensors", ".bin")


@contextmanager
def hub_of(files: Mapping[str, bytes], *, served: Mapping[str, bytes] | None = None) -> Iterator[str]:
    """The address of a hub whose one model has these files; `served` are bytes that it gives out in their place."""
    given = dict(files) | dict(served or {})

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            prefix = f"/{NAME}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in given:
                name = path.removeprefix(prefix)
                self._send(200, given[name], with_body=with_body, etag=_sha(files[name]))
            elif path in (
                f"/api/models/{NAME}",
                *(f"/api/models/{NAME}/revision/{at}" for at in ("v1", COMMIT)),
            ):
                self._send(200, json.dumps(_info(files)).encode(), with_body=with_body)
            elif path == f"/api/models/{NAME}/tree/{COMMIT}":
                self._send(200, json.dumps(_tree(files)).encode(), with_body=with_body)
            else:
                code = "RevisionNotFound" if path.startswith(f"/api/models/{NAME}/") else "RepoNotFound"
                self._send(404, b"{}", with_body=with_body, **{"X-Error-Code": code})

        def _send(self, status: int, body: bytes, *, with_body: bool, etag: str = "", **more: str) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', **more}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _info(files: Mapping[str, bytes]) -> dict[str, Any]:
    siblings = [
        {"rfilename": name, "size": len(data), "blobId": "0", **_lfs(name, data, "sha256")}
        for name, data in files.items()
    ]
    return {"id": NAME, "modelId": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


def _tree(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": name, "size": len(data), "oid": "0", **_lfs(name, data, "oid")}
        for name, data in files.items()
    ]


def _lfs(name: str, data: bytes, key: str) -> dict[str, Any]:
    return {"lfs": {key: _sha(data), "size": len(data), "pointerSize": 1}} if name.endswith(LARGE) else {}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
