"""A real OpenAI-compatible HTTP server on this machine for the tests of the judge, with every failure on demand."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = re.compile(r'<answer number="(\d)">\n(.*?)\n</answer>', re.S)


@dataclass
class Reply:
    """One HTTP answer. text: the model's words (a completion is made of them); body: sent as it stands instead."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def verdict(which: str) -> Reply:
    return Reply(json.dumps({"reason": "so it is", "verdict": which}))


def longer(first: str, second: str) -> Reply:
    """A judge that is fair to position: the longer answer."""
    return verdict("tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2")


@dataclass
class Server:
    """url: its base. asked: what came in, (headers, body) each. most: the largest number of requests at one time."""

    url: str
    asked: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    open: int = 0
    most: int = 0


@contextmanager
def serving(answer: Callable[[int, str, str], Reply], port: int = 0) -> Iterator[Server]:
    """A server while the block runs. answer: (number of the request from 0, first answer, second answer) -> Reply."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.asked)
                server.asked.append((dict(self.headers), body))
                server.paths.append(self.path)
                server.open += 1
                server.most = max(server.most, server.open)
            try:
                shown = dict(ANSWER.findall(body["messages"][1]["content"]))
                reply = answer(number, shown["1"], shown["2"])
                time.sleep(reply.delay)
            finally:
                with lock:
                    server.open -= 1  # before it goes out: who has the answer may ask again at once
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait
                self.send(reply)

        def send(self, reply: Reply) -> None:
            message = {
                "choices": [{"message": {"role": "assistant", "content": reply.text}}],
                "usage": {"total_tokens": 7},
            }
            content = json.dumps(message).encode() if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
