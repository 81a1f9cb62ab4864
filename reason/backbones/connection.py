"""Requests to a server, many at a time: asked again while it may still answer, and given up in words.

They run in a thread of their own, so that answers arrive while something else is computed. A request has one
answer, however often it had to be asked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from reason.errors import ConfigError, RunError

PAUSE = 32.0  # seconds between two tries at most, unless the server asks for more
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # states that pass
SHOWN = 300  # characters of what a server says


@dataclass(frozen=True)
class Address:
    """Where a server is, and how it is spoken to.

    url: http or https, with or without /v1 at its end. model: as the server names it; "" = the only one it has.
    key: the name of an environment variable with the key of its API; "" = none. context: tokens that a text can have;
    0 = as the server says. concurrency: requests at once. timeout: seconds that one may take. retries: how
    often it is tried again; pause: seconds before the first time, doubled each time.

    Raises:
        ConfigError: values that cannot be, or a key that would cross the network unencrypted.
    """

    url: str
    model: str = ""
    key: str = ""
    context: int = 0
    concurrency: int = 32
    timeout: float = 300.0
    retries: int = 6
    pause: float = 0.5

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
            httpx2.URL(self.url)
        except (ValueError, httpx2.InvalidURL) as error:
            raise ConfigError(f"The address of the server cannot be read: {error}.", _LIKE) from None
        if parts.username or parts.password:
            raise ConfigError(
                "The address of the server holds a user name or a password.",
                "Put the key into an environment variable, and give the name of that.",
            )
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ConfigError(f"{self.url!r} is not the address of a server.", _LIKE)
        if (
            self.concurrency < 1
            or self.timeout <= 0
            or self.retries < 0
            or self.pause < 0
            or self.context < 0
        ):
            raise ConfigError(
                "A server is asked at least one thing at a time, for more than 0 seconds.",
                "Check concurrency, timeout, retries, pause and context.",
            )
        if self.key and parts.scheme == "http" and not self.near:
            raise ConfigError(
                f"The key in {self.key} would go to {host} unencrypted.",
                "Use https, or a tunnel to a port of this machine.",
            )

    @property
    def near(self) -> bool:
        """Whether it is this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")

    @property
    def base(self) -> str:
        """What all its paths begin with."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    def secret(self) -> str:
        """The key itself. It is never part of a message.

        Raises:
            ConfigError: the environment does not have it, or it cannot be one.
        """
        if not self.key:
            return ""
        found = os.environ.get(self.key, "").strip()
        if not found:
            raise ConfigError(
                f"The environment has no {self.key}, which should hold the key of the server.",
                f"Set it with: export {self.key}=...",
            )
        if not all("!" <= c <= "~" for c in found):
            raise ConfigError(f"{self.key} holds spaces or signs that no key has.", "Copy the key again.")
        return found


_LIKE = "It looks like http://localhost:8000 or https://host/v1."


class Refused(RunError):
    """The server understood and said no. status: of HTTP."""

    def __init__(self, message: str, hint: str = "", status: int = 0):
        super().__init__(message, hint)
        self.status = status

    def __reduce__(self):
        return (type(self), (self.message, self.hint, self.status))


class Garbled(Exception):
    """Raised by who checks an answer: it is none, and another one may be."""


Check = Callable[[Any], None]


class Connection:
    """A server that is asked JSON for JSON.

    retried: how often something was asked again.

    Raises:
        ConfigError: the environment lacks the key.
    """

    def __init__(self, address: Address):
        self.address, self.retried = address, 0
        self._secret = address.secret()
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self._client = httpx2.AsyncClient(
            headers=headers, trust_env=not address.near, 
            timeout=httpx2.Timeout(address.timeout, connect=min(10.0, address.timeout), pool=None),
            limits=httpx2.Limits(max_connections=address.concurrency, max_keepalive_connections=address.concurrency),
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(address.concurrency)
        self._thread = threading.Thread(target=_work, args=[self._loop], name="server", daemon=True)
        self._thread.start()
        self.end = weakref.finalize(self, _end, self._loop, self._thread, self._client)

    def start(
        self, path: str, body: dict[str, Any] | None = None, check: Check | None = None, retries: int | None = None
    ) -> Future[Any]:  # fmt: skip
        """Ask, and go on.

        Args:
            path: behind the base. body: None: it is a GET. check: raises ``Garbled`` for an answer that is none.
            retries: None: as the address says.

        Returns:
            The answer to come, or:
            Refused: the server says that the request is wrong.
            RunError: it gave no answer, however often it was asked.
        """
        tries = 1 + (self.address.retries if retries is None else min(retries, self.address.retries))
        return asyncio.run_coroutine_threadsafe(self._ask(path, body, check, tries), self._loop)

    def ask(
        self, path: str, body: dict[str, Any] | None = None, check: Check | None = None, retries: int | None = None
    ) -> Any:  # fmt: skip
        """``start``, and wait."""
        future = self.start(path, body, check, retries)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _ask(self, path: str, body: dict[str, Any] | None, check: Check | None, tries: int) -> Any:
        url, pause = f"{self.address.base}/{path}", self.address.pause
        async with self._places:
            for left in range(tries - 1, -1, -1):
                wait = min(pause, PAUSE) * (0.5 + random.random())
                try:
                    async with asyncio.timeout(self.address.timeout):
                        reply = await self._client.request("GET" if body is None else "POST", url, json=body)
                    if reply.status_code in AGAIN:
                        wait = max(wait, min(_asked_to_wait(reply), self.address.timeout))
                        raise Garbled(f"it said {self._said(reply)}")
                    if not reply.is_success:
                        raise self._refusal(path, reply)
                    try:
                        found = reply.json()
                    except (ValueError, RecursionError):
                        raise Garbled(f"its answer is not JSON: {self._said(reply)}") from None
                    if check is not None:
                        check(found)
                    return found
                except TimeoutError:
                    trouble = f"it gave no answer in {self.address.timeout:g} seconds"
                except httpx2.RequestError as error:  # of the way there; its text holds no headers
                    trouble = (
                        f"{_NAMES.get(type(error).__name__, type(error).__name__)} {self._clean(str(error))}"
                    )
                except Garbled as error:
                    trouble = str(error)
                if left:
                    self.retried += 1
                    await asyncio.sleep(wait)
                    pause *= 2
        raise RunError(
            f"The server at {self.address.base} failed {tries} time{'s' * (tries > 1)}; the last time {trouble.strip()}.",
            "Look at the log of the server. What was finished before is kept.",
        )

    def _refusal(self, path: str, reply: httpx2.Response) -> Refused:
        code, where = reply.status_code, self.address.base
        hint = "Check its address, the name of the model and the length of the texts."
        if code in (401, 403):
            hint = (
                f"Check the key in {self.address.key}."
                if self.address.key
                else "It wants a key: put it into an environment variable, and name that."
            )
        elif reply.is_redirect:
            hint = "It points to another address; give that one."
        elif code in (404, 405):
            hint = f"Check that it has {where}/{path}: completions, not only chat."
        return Refused(f"The server at {where} refuses: {self._said(reply)}.", hint, code)

    def _said(self, reply: httpx2.Response) -> str:
        """Status and words of an answer."""
        try:
            said = reply.json()
            for name in ("error", "detail", "message"):
                if isinstance(said, dict) and said.get(name):
                    said = said[name]
        except (ValueError, RecursionError):
            said = reply.text
        return f"{reply.status_code} {self._clean(str(said))}".strip()

    def _clean(self, text: str) -> str:
        """Fit for a message, and without the key, even where a server repeats it."""
        if self._secret:
            text = text.replace(self._secret, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + "..."


_NAMES = {
    "ConnectError": "it could not be reached:",
    "ConnectTimeout": "it could not be reached in time.",
    "ReadTimeout": "it stopped answering.",
    "ReadError": "the connection broke:",
    "RemoteProtocolError": "the connection broke:",
}


def _asked_to_wait(reply: httpx2.Response) -> float:
    """Seconds, of the header Retry-After; 0 without."""
    said = reply.headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(said)) if float(said) < float("inf") else 0.0
    except ValueError:
        pass
    try:
        from datetime import UTC, datetime

        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _work(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx2.AsyncClient) -> None:
    async def finish() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()

    if threading.current_thread() is thread:  # the garbage was collected there
        loop.call_soon(loop.stop)
        return
    try:
        asyncio.run_coroutine_threadsafe(finish(), loop).result(5)
    except TimeoutError:
        return
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    if not thread.is_alive():
        loop.close()
