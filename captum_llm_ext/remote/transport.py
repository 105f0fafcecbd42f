"""JSON over HTTP with retries, interruptible at any time."""

import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

from captum_llm_ext.base.terminal import one_line
from captum_llm_ext.remote.connection import Answer, Connection, TooLongError

# Seconds before the second try, doubled for every further one, up to the maximum. Chosen, not
# measured.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
# A server that has never responded is most likely down: seconds of retries. Chosen, not measured.
_FIRST_PATIENCE = 4.0
# Maximum requested wait in seconds that is respected. Chosen, not measured.
_MOST_PATIENCE = 600.0
_SHOWN = 500
# Retries of an invalid response with status 200, as from a gateway. Chosen, not measured.
_GARBAGE_TRIES = 2
# Messages after which retries are useless, whatever the status.
_FINAL = ("insufficient_quota", "exceeded your current quota", "credit balance is too low")
_INVALID = ("validation error", "invalid_request_error", "badrequesterror")
# Maximum size of a response, besides what belongs to a long prompt. Chosen, not measured.
_MOST_BYTES = 2**24
_SHORTEST_SECRET = 6
# For a hint in an error: time limit in seconds, and number of model names. Chosen, not measured.
_HINT_WITHIN, _N_NAMED = 5.0, 5
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
# Statuses of servers that do not support an argument, or an endpoint.
UNKNOWN_ARGUMENT = (None, 400, 404, 422, 501)
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class ApiError(RuntimeError):
    """A server refused a request, or returned something other than requested.

    Attributes:
        status: The HTTP status; None if the response itself is wrong.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnusableAnswerError(ApiError, ValueError):
    """The response of a server or a provider cannot be used."""


class GarbageError(ApiError):
    """A response of status 200 without content: truncated JSON, a gateway's page, an error."""


class TooSlowError(ConnectionError):
    """A request with several prompts timed out; fewer may succeed."""


class InterruptedRequestError(RuntimeError):
    """A request aborted by the user's interrupt, or by the failure of another one."""


class Secrets:
    """Secrets, which are removed from all messages."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = {name: value.strip() for name, value in headers.items()}
        for name, value in self._headers.items():
            if not value.isascii() or not value.isprintable():
                raise ValueError(
                    f"the header {name!r} holds characters that no header may: check the key."
                )

    @property
    def headers(self) -> dict[str, str]:
        """Headers with the secrets."""
        return dict(self._headers)

    def hidden(self, text: str) -> str:
        """A text with the secrets removed."""
        for value in self._headers.values():
            for secret in (value, value.removeprefix("Bearer ")):
                if len(secret) >= _SHORTEST_SECRET:
                    text = text.replace(secret, "***")
        return text

    def __repr__(self) -> str:
        return "Secrets(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a provider holds an API key and is not pickled: construct it again.")


def shown_url(url: str) -> str:
    """A URL without user, password, query and fragment.

    If the parts are ambiguous, nothing of it is shown.
    """
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        # After a password with a slash or similar, the apparent host may be a user's name.
        is_plain = "@" not in parts.path + parts.query + parts.fragment
        is_plain &= bool(parts.netloc) or "@" not in url
    except ValueError:
        is_plain, parts, host = False, SplitResult("", "", "", "", ""), ""
    if not is_plain:
        return "***"
    return one_line(urlunsplit((parts.scheme, host, parts.path, "", "")))


class Http:
    """An HTTP client of one server, usable by several threads at the same time.

    Args:
        url: Base URL of paths.
        secrets: Headers with keys.
        timeout: Seconds allowed for a whole response.
        max_retries: Number of retries after 429, 5xx, or no response.

    Raises:
        ValueError: If the URL is invalid, or contains a password or a query.
    """

    def __init__(self, url: str, secrets: Secrets, *, timeout: float, max_retries: int) -> None:
        self._url = _checked(url)
        self._secrets, self._timeout, self._max_retries = secrets, timeout, max_retries
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._changed = threading.Condition()
        self._epoch = 0
        self._was_reached = self._has_answered = False
        self._not_before = 0.0  # until then the server wants no requests, from any thread
        self._random = random.Random()  # separate from the global one
        weakref.finalize(self, _close_all, self._idle)

    @property
    def url(self) -> str:
        """The URL without secrets."""
        return urlunsplit(self._url)

    def get(self, path: str) -> Any:
        """JSON at a path. Errors are those of `post`."""
        return self._send("GET", path, None, _MOST_BYTES)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        most_bytes: int = 0,
        is_splittable: bool = False,
    ) -> Any:
        """The server's response to a body, both as JSON.

        Args:
            path: Appended to the URL.
            body: The request.
            most_bytes: Maximum size of the response beyond 16 MiB.
            is_splittable: Whether the request can be split: then it is not retried after a timeout.

        Raises:
            ApiError: If the server refuses it, keeps failing, or returns invalid JSON or too much.
            ConnectionError: If there is no response after all retries.
            TooSlowError: If there is none in time, and `is_splittable`.
            InterruptedRequestError: After `interrupt`.
        """
        most = _MOST_BYTES + most_bytes
        return self._send("POST", path, json.dumps(body).encode(), most, is_splittable)

    def interrupt(self) -> None:
        """Aborts all requests under way, in all threads; later ones are unaffected."""
        with self._changed:
            self._epoch += 1
            self._not_before = 0.0  # it will say so again
            busy = list(self._busy)
            self._changed.notify_all()
        for connection in busy:
            connection.cut()

    def _send(
        self, method: str, path: str, body: bytes | None, most: int, is_splittable: bool = False
    ) -> Any:
        epoch, began = self._epoch, time.monotonic()
        n_tries = n_garbage = 0
        while True:
            n_tries += 1
            wait = None
            is_busy = False
            self._rest(self._not_before - time.monotonic(), epoch)
            try:
                status, headers, content = self._once(method, path, body, epoch, most)
                self._keep_to_limits(headers)
                if status < 300:
                    parsed = self._parsed(headers, content)
                    self._has_answered = True
                    return parsed
                failure = self._refused(status, headers, content)
                is_final = _is_final(status, content)
                if is_final and status >= 500:  # others respond with 422
                    raise ApiError(str(failure), 422)
                if status not in _AGAIN or is_final:
                    raise failure
                is_busy = status == 429
                wait = _retry_after(headers)
            except GarbageError as error:
                failure, n_garbage = error, n_garbage + 1
                if n_garbage > min(_GARBAGE_TRIES, self._max_retries):
                    raise
            except TooLongError:
                message = f"{self.url} answered with more than {most / 2**20:.0f} MiB"
                raise ApiError(f"{message}, which is no valid answer to the request.") from None
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                failure = self._unreached(error)
                if is_splittable and isinstance(error, TimeoutError) and epoch == self._epoch:
                    raise TooSlowError(str(failure)) from error
                if epoch == self._epoch and not self._may_help(error):
                    raise failure from error
            self._check(epoch)
            # Random waits, so that threads that failed together do not retry together.
            longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (n_tries - 1))
            rest = self._random.uniform(longest / 2, longest)
            is_known = self._has_answered or is_busy
            too_long = wait is not None and wait > (_MOST_PATIENCE if is_known else _FIRST_PATIENCE)
            ends = time.monotonic() + max(rest, wait or 0.0)
            is_down = not is_known and ends > began + _FIRST_PATIENCE
            if n_tries > self._max_retries or too_long or is_down:
                reason = f"asked to wait {wait:.0f} seconds" if too_long else f"{n_tries} tries"
                failure.args = (f"{failure.args[0]} ({reason})",)
                raise failure
            self._not_before = max(self._not_before, time.monotonic() + (wait or 0.0))
            self._rest(rest - (wait or 0.0), epoch)

    def _keep_to_limits(self, headers: Mapping[str, str]) -> None:
        """Waits until the server accepts requests again, by its rate limit headers."""
        for kind in ("requests", "tokens"):
            left = headers.get(f"x-ratelimit-remaining-{kind}")
            wait = _seconds(headers.get(f"x-ratelimit-reset-{kind}") or "")
            if left is not None and left.strip() == "0" and wait is not None:
                until = time.monotonic() + min(wait, _MOST_PATIENCE)
                self._not_before = max(self._not_before, until)

    def _may_help(self, error: Exception) -> bool:
        """Whether a retry is useful; a server that has never responded probably does not exist."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return False
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return self._was_reached
        # Other errors arise in a TLS connection that another thread has closed.
        return isinstance(error, OSError | http.client.HTTPException)

    def _rest(self, seconds: float, epoch: int) -> None:
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._epoch != epoch, timeout=seconds)
            self._check(epoch)

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise InterruptedRequestError("the request was interrupted.")

    def _once(self, method: str, path: str, body: bytes | None, epoch: int, most: int) -> Answer:
        with self._changed:
            known = self._idle.pop() if self._idle else None
        if known is not None and not known.is_quiet():
            known.close()
            known = None
        try:
            return self._exchange(known or self._connection(), method, path, body, epoch, most)
        except _STALE:
            if known is None or epoch != self._epoch:
                raise
        # The server had closed the connection meanwhile, which is not a failure.
        return self._exchange(self._connection(), method, path, body, epoch, most)

    def _connection(self) -> Connection:
        return Connection(self._url, self._timeout)

    def _exchange(
        self,
        connection: Connection,
        method: str,
        path: str,
        body: bytes | None,
        epoch: int,
        most: int,
    ) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            with self._changed:
                self._check(epoch)
                self._busy.add(connection)
            answer = connection.exchange(
                method, self._url.path + path, body, headers | self._secrets.headers, most
            )
            self._was_reached = True
            return answer
        finally:
            with self._changed:
                self._busy.discard(connection)
                if connection.is_kept:
                    self._idle.append(connection)
            if not connection.is_kept:
                connection.close()

    def _parsed(self, headers: Mapping[str, str], content: bytes) -> Any:
        packed = headers.get("Content-Encoding") or "identity"
        if packed.strip().lower() != "identity":  # its uncompressed size is unlimited
            raise ApiError(
                f"{self.url} answered in {self._shown(packed)!r}, which was not requested."
            )
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            shown = self._shown(content.decode("utf-8", "replace"))
            raise GarbageError(
                f"{self.url} did not answer with JSON: {shown!r}. Give the URL of an "
                "OpenAI-compatible API, such as http://localhost:8000/v1."
            ) from None
        if isinstance(found, dict):
            held = cast(dict[str, Any], found)
            if held.get("error") and not (held.get("choices") or held.get("content")):
                message = self._shown(_message(content))
                raise GarbageError(f"{self.url} answered with an error: {message}")
            if "choices" in held and held["choices"] is None:
                raise GarbageError(f"{self.url} answered without `choices`.")
        return found

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        said = self._shown(_message(content))
        if 300 <= status < 400:
            to = self._shown(shown_url(headers.get("Location") or "nowhere"))
            return ApiError(f"{self.url} has moved to {to}: give that URL.", status)
        advice = {
            401: "Give `api_key`, or set OPENAI_API_KEY.",
            403: "Give an `api_key` that may use this model.",
            404: "Check the URL (it mostly ends in /v1) and the name of the model.",
        }
        what = f"{self.url} answered {status}: {said}"
        if status in advice:
            what += f"{'' if said.endswith(('.', '?', '!')) else '.'} {advice[status]}"
        if status == 404:
            what += self._there()
        return ApiError(what, status)

    def _there(self) -> str:
        """A hint on what the server has instead: names of models, or another path."""
        for path in dict.fromkeys((self._url.path, "/v1")):
            url = urlunsplit(self._url._replace(path=path))
            try:
                other = Http(url, self._secrets, timeout=_HINT_WITHIN, max_retries=0)
                status, _, content = other._once("GET", "/models", None, 0, _MOST_BYTES)
                found = json.loads(content) if status == 200 else None
                models: list[Any] = found["data"] if isinstance(found, dict) else []
                names = [str(one["id"]) for one in models[:_N_NAMED]]
            except Exception:  # only a hint: the refusal is reported
                continue
            if path != self._url.path and names:
                return f" There is one at {self._shown(url)}."
            if names:
                more = ", …" if len(models) > len(names) else ""
                return f" It has the models {self._shown(', '.join(map(repr, names)))}{more}."
        return ""

    def _unreached(self, error: Exception) -> Exception:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, TimeoutError):
            what = f"no whole answer within {self._timeout:g} seconds (`timeout`)"
        advice = ""
        if not self._was_reached and isinstance(error, ConnectionRefusedError | socket.gaierror):
            advice = ". Is the server up, and are its name and port right?"
        return ConnectionError(f"{self.url} cannot be reached: {self._shown(what)}{advice}")

    def _shown(self, text: str) -> str:
        """A server's message as one line, without keys or control characters."""
        return one_line(" ".join(self._secrets.hidden(text).split()))[:_SHOWN]


def _checked(url: str) -> SplitResult:
    given = url.strip() if isinstance(url, str) else ""
    if "@" in given or "?" in given or "#" in given:
        raise ValueError(
            "`api_url` holds a user or a query, which might be a key and would be shown: give "
            "`api_key`, or `headers`."
        )
    try:
        parts = urlsplit(given)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # invalid port, or brackets
        parts, is_one = SplitResult("", "", "", "", ""), False
    # HTTP allows no other characters; some would start new header lines.
    if not is_one or not given.isascii() or not given.isprintable() or " " in given:
        raise ValueError(
            f"`api_url` is {shown_url(str(url))!r}: give a URL such as http://localhost:8000/v1."
        )
    path = parts.path.rstrip("/").removesuffix("/completions")
    return SplitResult(parts.scheme, parts.netloc, path, "", "")


def _message(content: bytes) -> str:
    """The server's error message."""
    text = content.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and name in found:
                found = cast(dict[str, Any], found)[name]
        return found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        return text or "nothing"


def _is_final(status: int, content: bytes) -> bool:
    """Whether a temporary status has a permanent reason."""
    text = content.decode("utf-8", "replace").lower()
    reasons = _FINAL if status == 429 else _INVALID
    return any(reason in text for reason in reasons)


def _seconds(text: str) -> float | None:
    """A time in rate limit headers: 1.5, 20ms, 6m0s, 1h."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    parts = re.findall(r"([0-9]+(?:\.[0-9]*)?)(ms|[smhd]|)", text.strip())
    if not parts or "".join(n + unit for n, unit in parts) != text.strip():
        return None
    return sum(float(n) * units[unit] for n, unit in parts)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until the server wants the next request, if it says so."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _close_all(connections: list[Connection]) -> None:
    while connections:
        connections.pop().close()


def api_key(given: str | None, url: str, variable: str = "OPENAI_API_KEY") -> str | None:
    """The given key; or the environment's, for the hosts that it belongs to.

    Args:
        given: The user's key, for any host.
        url: URL to which it would be sent.
        variable: Name of the environment variable; ``OPENAI_API_KEY`` is for api.openai.com, the
            host of ``OPENAI_BASE_URL`` and this machine.
    """
    if given:
        return given
    try:
        host = (urlsplit(url.strip()).hostname or "").lower()
        own = urlsplit(os.environ.get(variable.replace("API_KEY", "BASE_URL"), "")).hostname
    except (ValueError, AttributeError):
        return None
    company = variable.split("_")[0].lower()
    is_official = any(host == f"api.{company}.{end}" for end in ("com", "ai"))
    if is_official or host in ("localhost", "127.0.0.1", "::1") or (own and host == own.lower()):
        return os.environ.get(variable) or None
    return None
