"""A chat model behind an OpenAI-compatible endpoint. Only the standard library speaks HTTP here."""

from __future__ import annotations

import json
import random
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from time import time
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import UsageError, UserError
from tunesmith.jsontext import parse_json

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked again nevertheless
LONGEST_REPLY = 1 << 22  # bytes
HOPELESS = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)  # no use to try again

Messages = Sequence[Mapping[str, str]]


class NoReply(Exception):
    """The endpoint answered with something that is no chat completion; the message is its beginning."""


class _Refusal(Exception):
    """A status that is not 2xx."""

    def __init__(self, code: int, said: str, headers: Any) -> None:
        self.code, self.said, self.headers = code, said, headers


@dataclass
class Endpoint:
    """A model at `url`, the base of an OpenAI-compatible API (https://api.openai.com/v1).

    key: sent as a bearer token, never shown. timeout: seconds without a byte. retries: how often a question is sent
    again after a time-out, a broken connection, 429 or 5xx. wait: seconds before the first of them, doubled each time;
    Retry-After can only lengthen it. Many threads may ask at once; `stop` ends their waiting.
    Raises: UsageError if url or key cannot be used.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    retries: int = 5
    wait: float = 0.5
    tokens: int = field(default=0, init=False)  # as the endpoint counts them

    def __post_init__(self) -> None:
        self.address, self.name = _address(self.url)
        self.key = (self.key or "").strip() or None
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY_VARIABLE} holds characters that no key contains; set it again")
        self.stop = threading.Event()
        self._lock, self._reached = threading.Lock(), False
        self._sampling: dict[str, Any] = {"temperature": 0}
        # No handler of redirects: they would carry the key to another host.
        self._opener = urllib.request.OpenerDirector()
        for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError"):
            self._opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
        self._opener.add_handler(urllib.request.HTTPErrorProcessor())

    def chat(self, messages: Messages) -> str:
        """The reply to these messages. Raises: UserError if none comes, NoReply if it cannot be read."""
        trouble, longer = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                pause = self.wait * 2 ** (attempt - 1) * random.uniform(1, 1.25)
                if self.stop.wait(max(pause, longer)):
                    raise UserError(f"{self.name} was not asked any more questions")
            sampling, longer = self._sampling, 0.0
            try:
                return self._send(messages, sampling)
            except _Refusal as refusal:
                trouble = f"{refusal.code}{': ' + refusal.said if refusal.said else ''}"
                if refusal.code == 400 and sampling and "temperature" in refusal.said:
                    self._sampling = {}  # some models take none but their own
                elif refusal.code == 429 or refusal.code >= 500:
                    longer = min(LONGEST_WAIT, retry_after(refusal.headers.get("Retry-After")))
                else:
                    raise self._explained(refusal) from None
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                trouble = self._one_line(cause)
                if isinstance(cause, HOPELESS) and not self._reached:
                    way = "start the server there, or give the base URL of one that is running"
                    raise UserError(f"{self.name} cannot be reached ({trouble}); {way}") from None
        raise UserError(f"{self.name} gave no answer in {self.retries + 1} tries (the last: {trouble})")

    def _send(self, messages: Messages, sampling: Mapping[str, Any]) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages), **sampling}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "tunesmith"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            request = urllib.request.Request(self.address, body, headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                content = response.read(LONGEST_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refusal(error.code, self._message(error.read(LONGEST_REPLY)), error.headers) from None
        self._reached = True
        try:
            reply = parse_json(content)
            text, spent = reply["choices"][0]["message"]["content"], (reply.get("usage") or {}).get("total_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            text, spent = None, 0
        with self._lock:
            self.tokens += spent if isinstance(spent, int) else 0
        if not isinstance(text, str):
            raise NoReply(content[:200].decode(errors="replace"))
        return text

    def _explained(self, refusal: _Refusal) -> UserError:
        """What a status means, and the way out."""
        elsewhere = refusal.headers.get("Location")
        if refusal.code in (401, 403):
            way = f"it refuses the key in {KEY_VARIABLE}" if self.key else f"it requires a key: set {KEY_VARIABLE}"
        elif refusal.code == 404:
            way = f"it has no model {self.model!r}, or the URL is not the base of its API (most end in /v1)"
        elif elsewhere and 300 <= refusal.code < 400:
            way = f"it has moved to {self._one_line(elsewhere)}; give that base URL"
        else:
            way = f"it rejects the request; check the URL and the model {self.model!r}"
        return UserError(f"{self.name} answered {refusal.code}{f' ({refusal.said})' if refusal.said else ''}: {way}")

    def _message(self, body: bytes) -> str:
        """What an error's body says, in one short line without the key."""
        text = body.decode(errors="replace")
        try:
            content = parse_json(text)
            content = content.get("error", content)
            text = str(content["message"] if isinstance(content, dict) else content)
        except (ValueError, LookupError, AttributeError):
            text = "" if "<html" in text.lower() else text
        return self._one_line(text)[:200] if text.strip() else ""

    def _one_line(self, cause: object) -> str:
        if isinstance(cause, TimeoutError):
            return f"no reply within {self.timeout:g} s"
        text = " ".join(str(cause).split()) or type(cause).__name__
        return text.replace(self.key, "[key]") if self.key else text


def _address(url: str) -> tuple[str, str]:
    """Where questions are sent, and how it is called in messages: without a query, which may hold a key.

    Raises: UsageError if `url` is not the base of an API.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, half an IPv6 address
        usable = False
    if not usable or any(c.isspace() for c in url):
        shown = re.sub(r"//[^/]*@", "//", url.partition("?")[0])
        raise UsageError(
            f"--judge {shown}: expected the base URL of an OpenAI-compatible API, such as http://localhost:8000/v1"
        )
    if parts.username or parts.password:
        raise UsageError(
            f"--judge: the URL of {parts.hostname} holds a password; give the key in {KEY_VARIABLE} instead"
        )
    path = parts.path.rstrip("/")
    whole = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return parts._replace(path=whole).geturl(), parts._replace(query="", fragment="").geturl()


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 where it says nothing.

    >>> retry_after("7"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, 0.0, 0.0)
    """
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time())
    except ValueError:
        return 0.0
