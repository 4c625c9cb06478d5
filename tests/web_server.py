"""A web server for what guests send and fetch: the end of either is told, whatever becomes of the connection."""

from __future__ import annotations

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class _Handler(BaseHTTPRequestHandler):
    """Answers a GET with what the server has, and a POST with the checksum of what came."""

    server: WebServer

    def do_GET(self) -> None:
        self._answer(self.server.content)

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        digest = hashlib.md5()
        while left:
            part = self.rfile.read(min(left, 1 << 16))
            assert part
            digest.update(part)
            left -= len(part)
        self._answer(digest.hexdigest().encode())

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class WebServer(ThreadingHTTPServer):
    """On a port of its own of `address`, in the namespace that it is made in; to be used in a `with`."""

    daemon_threads = True

    def __init__(self, address: str, content: bytes) -> None:
        super().__init__((address, 0), _Handler)
        self.content = content
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def checksum(self) -> str:
        """Of its content, as md5sum has it."""
        return hashlib.md5(self.content).hexdigest()

    def server_close(self) -> None:
        self.shutdown()
        self._thread.join()
        super().server_close()
