"""A real object store for tests: an S3 server of its own process, and a proxy before it that counts, cuts and goes away.

client --HTTP--> Proxy (this process) --HTTP--> moto's S3 server (a child process, gone when its standard input closes)
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import boto3
import numpy as np

REQUEST = re.compile(rb"(GET|HEAD|PUT|POST) (\S+) HTTP/1\.[01]\r\n")
BUCKET = "shards"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
}
"""What a client needs, beside AWS_ENDPOINT_URL; nothing of the user's own settings is read."""


def some_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


class Store:
    """A running server with one empty bucket, `BUCKET`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing-secret",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)


@contextmanager
def running_store() -> Iterator[Store]:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield Store(int(server.stdout.readline()))
    finally:
        server.kill()
        server.wait(timeout=10)
        server.stdin.close()
        server.stdout.close()


class Proxy:
    """Passes bytes between clients and a port of this machine."""

    def __init__(self, to_port: int) -> None:
        self.requests: list[str] = []  # "GET /bucket/name", in the order of coming
        self._to_port = to_port
        self._cuts = self._cut_after = self._passed = 0
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, name: str) -> int:
        return self.requests.count(f"GET /{BUCKET}/{name}")

    def cut(self, times: int, after: int) -> None:
        """Drop `times` connections: the one in use whenever `after` more bytes of answers have passed."""
        with self._lock:
            self._cuts, self._cut_after, self._passed = times, after, 0

    @property
    def cuts_left(self) -> int:
        return self._cuts

    def stop(self) -> None:
        """From now on nobody listens, and whoever was connected is not."""
        # shutdown wakes the thread that accepts, close alone does not
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for end in self._sockets:
                _drop(end)

    def _start(self, work, *arguments) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to_port))
                with self._lock:
                    self._sockets += [client, server]
                self._start(self._questions, client, server)
                self._start(self._answers, server, client)

    def _questions(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.requests += [f"{verb.decode()} {path.decode()}" for verb, path in REQUEST.findall(data)]
                server.sendall(data)
        _drop(server)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 12):
                client.sendall(data)
                if self._is_cut(len(data)):
                    break
        _drop(client)
        _drop(server)

    def _is_cut(self, passed: int) -> bool:
        with self._lock:
            self._passed += passed
            if not self._cuts or self._passed < self._cut_after:
                return False
            self._cuts, self._passed = self._cuts - 1, 0
            return True


def _drop(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def serve() -> None:
    """Print the port of a new server, and serve until standard input closes."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    serve()
