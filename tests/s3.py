"""An object store of this process's own: moto's S3 server on loopback, spoken to by the real boto3."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from local_store import CREDENTIALS
from moto.server import ThreadedMotoServer


class Request(NamedTuple):
    """One request as the server saw it, and the bytes of its answer's body."""

    method: str
    path: str
    byte_range: str
    num_bytes: int


Fault = Callable[[str, str, str], "str | None"]
"""Method, path and byte range of a request -> what goes wrong with it: `error`, a status of 500; `short`, half of the
range; `cut`, half of the answer's body; `missing`, a status of 404; None if nothing."""
NO_SUCH_KEY = b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>"


class Counted:
    """A WSGI application that notes every request once its answer was sent."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.requests: list[Request] = []
        self.delay: list[float] = []
        self.faults: list[Fault] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.delay:
            time.sleep(self.delay[-1])
        byte_range = environ.get("HTTP_RANGE", "")
        asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], byte_range)
        fault = self.faults[-1](*asked) if self.faults else None
        if fault == "short":
            begin, end = map(int, byte_range.removeprefix("bytes=").split("-"))
            environ = {**environ, "HTTP_RANGE": f"bytes={begin}-{(begin + end) // 2}"}
        if fault == "error":
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            body = []
        elif fault == "missing":
            body = [NO_SUCH_KEY]
            start_response("404 Not Found", [("Content-Type", "application/xml")])
        else:
            body = self.app(environ, start_response)
        num_bytes = 0
        for part in body:
            sent = part[: len(part) // 2] if fault == "cut" else part
            num_bytes += len(sent)
            yield sent
        self.requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], byte_range, num_bytes))


@dataclass(frozen=True)
class Server:
    """Where the store answers, and what it was asked so far."""

    endpoint: str
    requests: list[Request]
    delay: list[float]
    """Seconds that an answer is held back, the last of them; none by default."""
    faults: list[Fault]

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Within the block requests fail as `fault` says, which is asked when each begins."""
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.pop()

    @contextmanager
    def asked(self) -> Iterator[list[tuple[str, str, str]]]:
        """Method, path and byte range of the requests that begin within the block; `requests` has them at their end."""
        found: list[tuple[str, str, str]] = []
        with self.failing(lambda *request: found.append(request)):
            yield found

    def settled(self) -> list[Request]:
        """All requests so far, once no more of them end."""
        before = -1
        while before != (before := len(self.requests)):
            time.sleep(0.2)
        return list(self.requests)

    def environment(self) -> dict[str, str]:
        """What boto3 and Streaming read; credentials that only this server takes."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            **CREDENTIALS,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def serve() -> Iterator[Server]:
    """A store on a free port of 127.0.0.1, gone when the block ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    # moto has no hook for it; the server hands every request to this attribute.
    counted = Counted(server._server.app)
    server._server.app = counted
    host, port = server.get_host_and_port()
    try:
        yield Server(f"http://{host}:{port}", counted.requests, counted.delay, counted.faults)
    finally:
        server.stop()
        server._server.server_close()


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test. `client` is boto3's own, so that tests see what is really there."""

    name: str
    server: Server
    client: Any = field(repr=False)

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the objects under a prefix, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def upload(self, folder: Path, prefix: str) -> str:
        """Put every file of a folder under a prefix; returns the prefix's URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), self.name, f"{prefix}/{path.relative_to(folder).as_posix()}")
        return f"{self.url}/{prefix}"


def make_bucket(server: Server, name: str) -> Bucket:
    """A new, empty bucket."""
    client = boto3.client("s3", endpoint_url=server.endpoint)
    client.create_bucket(Bucket=name)
    return Bucket(name, server, client)
