"""Keys of requests, by which equal ones are sent once."""

from array import array
from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

from captum_llm_ext.remote.providers import Request


def key(request: Request) -> bytes:
    """Equal for equal requests, 16 bytes.

    For a request of a single token, the digest of its ids in sequence.
    """
    asks_for = b"" if len(request.continuation_ids) == 1 else array("q", (request.first,)).tobytes()
    content = blake2b(array("q", request.ids).tobytes(), digest_size=16, key=asks_for)
    return content.digest()


def merged(requests: Iterable[Request]) -> dict[bytes, Request]:
    """Requests by key; equal ones are merged to request what any of them needs."""
    found: dict[bytes, Request] = {}
    for request in requests:
        k = key(request)
        known = found.get(k)
        if known is not None and known.wanted != request.wanted:
            both = tuple(sorted({*known.wanted, *request.wanted}))
            request = replace(known, wanted=both)
        found[k] = known if known is not None and known.wanted == request.wanted else request
    return found
