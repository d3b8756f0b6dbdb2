"""A real S3 server, moto's, and the way to it, which can be cut.

`make extra-s3-test` installs what it needs.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import s3fs

OUTAGE_SECONDS = 30.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Proxy:
    """Passes connections on to a port, unless it is told not to."""

    def __init__(self, target: int) -> None:
        self.port, self._target = free_port(), target
        self.is_out = False
        self.refused = self.passed = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", self.port))
        self._loop.run_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_out:
            self.refused += 1
            writer.close()
            return
        self.passed += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def outage(self, seconds: float) -> None:
        """Ends all connections, and accepts none for some time."""
        self.is_out = True
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.transport.abort)
        self._writers.clear()
        time.sleep(seconds)
        self.is_out = False


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """The way to a server with a bucket."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = Proxy(port)
    os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    # fsspec would go on with the server of another module.
    s3fs.S3FileSystem.clear_instance_cache()
    deadline = time.monotonic() + 60
    while True:
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            break
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield found
    server.kill()
