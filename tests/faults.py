"""A proxy between a client and the store of tests/s3.py that spoils some of the answers.

Whether an answer is spoilt depends on the seed, the request and how often it was made, not on the order in which
threads and processes come: the same run meets the same faults.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from s3 import NO_SUCH_KEY

FAULTS = {
    "error": "a status of 500",
    "throttle": "a status of 503, SlowDown",
    "reset": "a connection reset in the middle of the body",
    "cut": "half of the body, then the end of the connection",
    "slow": "half of the body, a pause, the rest",
    "flip": "one bit of the body turned over",
    "stale": "an earlier version of the object, or that there is none",
}
DROPPED = {"connection", "transfer-encoding", "content-length", "keep-alive"}
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Faults:
    """What goes wrong and how often.

    Args:
        fault: one of FAULTS.
        rate: share of the answers.
        seed: of the choice.
        pause: seconds of `slow`.
        earlier: name of an object -> its earlier content, for `stale`; any other is then said not to exist.
    """

    fault: str
    rate: float
    seed: int = 0
    pause: float = 3.0
    earlier: Mapping[str, bytes] = field(default_factory=dict)
    num_spoilt: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, request: str) -> bytes | None:
        """Random bytes of a request that is to be spoilt; None for one that is not. Each time it is made anew."""
        with self.lock:
            self.asked[request] += 1
            drawn = hashlib.sha256(f"{self.seed} {self.fault} {request} {self.asked[request]}".encode()).digest()
            if int.from_bytes(drawn[:8], "big") >= self.rate * 2**64:
                return None
            self.num_spoilt += 1
            return drawn[8:]


class Handler(BaseHTTPRequestHandler):
    """Passes a request on, and its answer back, spoilt or not."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    faults: Faults

    def forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in DROPPED]
        size = answer.getheader("Content-Length") or len(data)
        connection.close()
        # Without the bucket, whose name differs from run to run.
        drawn = self.faults.draw(f"{self.command} {self.key} {self.headers.get('Range', '')}")
        if drawn is None:
            self.send(answer.status, headers, data, size)
        else:
            getattr(self, self.faults.fault)(answer.status, headers, data, size, drawn)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815

    @property
    def key(self) -> str:
        return urlsplit(self.path).path.lstrip("/").partition("/")[2]

    def send(self, status: int, headers: Any, data: bytes, size: Any, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])
            self.wfile.flush()

    def error(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        self.send(500, [], b"", 0)

    def throttle(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        self.send(503, [("Content-Type", "application/xml")], SLOW_DOWN, len(SLOW_DOWN))

    def cut(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        self.send(status, headers, data, size, len(data) // 2)
        self.close_connection = True

    def reset(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        self.cut(status, headers, data, size, drawn)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def slow(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        self.send(status, headers, data, size, len(data) // 2)
        time.sleep(self.faults.pause)
        if self.command != "HEAD":
            self.wfile.write(data[len(data) // 2 :])

    def flip(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        spoilt = bytearray(data)
        if spoilt:
            spoilt[int.from_bytes(drawn[:4], "big") % len(spoilt)] ^= 1 << drawn[4] % 8
        self.send(status, headers, bytes(spoilt), size)

    def stale(self, status: int, headers: Any, data: bytes, size: Any, drawn: bytes) -> None:
        earlier = self.faults.earlier.get(self.key)
        if earlier is None or self.headers.get("Range"):
            self.send(404, [("Content-Type", "application/xml")], NO_SUCH_KEY, len(NO_SUCH_KEY))
        else:
            self.send(status, headers, earlier, len(earlier))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what some of the faults are for."""


@contextmanager
def faulty(endpoint: str, faults: Faults) -> Iterator[str]:
    """The endpoint of a proxy in front of another, gone when the block ends."""
    handler = type("Spoiling", (Handler,), {"upstream": urlsplit(endpoint).netloc, "faults": faults})
    proxy = Proxy(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(10)
