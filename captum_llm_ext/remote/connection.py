"""One HTTP connection, with limits on time and size of responses."""

import http.client
import io
import selectors
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast
from urllib.parse import SplitResult, urlsplit

# Seconds until a server that does not respond at all is given up. A lost packet is sent again after
# 1, 3 and 7 seconds (RFC 6298 with Linux' settings), all of which have time to succeed.
_CONNECTED_WITHIN = 10.0
_PIECE = 2**16  # bytes read between two checks of the deadline


class TooLongError(Exception):
    """A response, including its headers, exceeds the size limit."""


class Answer(NamedTuple):
    """A response, not parsed yet."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Connection:
    """A connection opened on first use and kept alive as long as the server allows.

    Args:
        url: Scheme, host and port of the server. Proxies are those of the environment.
        timeout: Seconds for a connection to be made, 10 at most, and for a whole answer.
    """

    def __init__(self, url: SplitResult, timeout: float) -> None:
        self._timeout, self._within = timeout, min(timeout, _CONNECTED_WITHIN)
        self._is_tls = url.scheme == "https"
        proxy = _proxy(url)
        self._prefix = f"http://{url.netloc}" if proxy is not None and not self._is_tls else ""
        host, port = url.hostname or "", url.port or (443 if self._is_tls else 80)
        self._host = host
        to = (host, port) if proxy is None else proxy
        self._inner = http.client.HTTPConnection(*to, timeout=self._within)
        if proxy is not None and self._is_tls:
            self._inner.set_tunnel(host, port)
        self.is_kept = False

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], most: int
    ) -> Answer:
        """Sends a request and reads the whole response. Redirects are not followed.

        Args:
            method, path, body, headers: As HTTP has them.
            most: Maximum number of bytes of the response, including headers.

        Raises:
            TimeoutError: If the whole response has not arrived in time, however slowly it trickles.
            TooLongError: If it is larger.
            OSError, http.client.HTTPException, ValueError: If there is no valid response.
        """
        self.is_kept = False
        until = time.monotonic() + self._timeout
        inner: Any = self._inner
        if not inner.sock:
            self._open()
        inner.sock.settimeout(_left(until))
        inner.response_class = partial(_Response, until=until, most=most)
        inner.request(method, self._prefix + path, body, dict(headers))
        answer: http.client.HTTPResponse = inner.getresponse()
        try:
            content = _content(answer, most)
        finally:
            answer.close()  # it holds the socket as well
        self.is_kept = not answer.will_close
        return Answer(answer.status, cast(Mapping[str, str], answer.headers), content)

    def is_quiet(self) -> bool:
        """Whether a kept connection is still open, without unexpected data."""
        sock: socket.socket | None = self._inner.sock
        with suppress(OSError, ValueError):
            return sock is not None and not _is_ready(sock, selectors.EVENT_READ, 0.0)
        return False

    def cut(self) -> None:
        """Aborts the exchange under way; any thread may call it."""
        with suppress(OSError, AttributeError):  # not yet connected, or closed by now
            self._inner.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection."""
        self._inner.close()

    def _open(self) -> None:
        until = time.monotonic() + self._within
        inner: Any = self._inner
        # A proxy's response is short.
        inner.response_class = partial(_Response, until=until, most=_PIECE)
        try:
            inner.connect()
            if self._is_tls:
                context = ssl.create_default_context()
                # In steps, since a socket's timeout restarts with every byte.
                inner.sock = context.wrap_socket(
                    inner.sock, server_hostname=self._host, do_handshake_on_connect=False
                )
                _shake_hands(inner.sock, until)
        except TimeoutError as error:
            within = f"no connection within {self._within:g} seconds"
            raise ConnectionRefusedError(within) from error


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *rest: Any, until: float, most: int, **more: Any):
        super().__init__(sock, *rest, **more)
        raw = cast(Any, self.fp).detach()
        self.fp = io.BufferedReader(_Within(raw, sock, until, most))


class _Within(io.RawIOBase):
    """Reads from a socket until a deadline and up to a size."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float, most: int) -> None:
        self._raw, self._sock, self._until, self._room = raw, sock, until, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._until))
        n: int | None = cast(Any, self._raw).readinto(buffer)
        self._room -= n or 0
        if self._room < 0:
            raise TooLongError
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


def _content(answer: http.client.HTTPResponse, most: int) -> bytes:
    if (answer.length or 0) > most:  # memory for it would be allocated beforehand
        raise TooLongError
    parts: list[bytes] = []
    while part := answer.read(_PIECE):
        parts.append(part)
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _shake_hands(sock: ssl.SSLSocket, until: float) -> None:
    sock.settimeout(0.0)
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            _is_ready(sock, selectors.EVENT_READ, _left(until))
        except ssl.SSLWantWriteError:
            _is_ready(sock, selectors.EVENT_WRITE, _left(until))


def _is_ready(sock: socket.socket, event: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        return bool(selector.select(seconds))


def _proxy(url: SplitResult) -> tuple[str, int] | None:
    """Host and port of the environment's proxy for a server, if there is one.

    Raises:
        ConnectionRefusedError: If it is invalid; it may contain a password, and is not displayed.
    """
    proxy = urllib.request.getproxies().get(url.scheme)
    if not proxy or urllib.request.proxy_bypass(url.hostname or ""):
        return None
    try:
        parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        return parts.hostname or "", parts.port or 80
    except ValueError:
        message = f"the proxy that the environment names for {url.scheme} has no valid address"
        raise ConnectionRefusedError(message) from None
