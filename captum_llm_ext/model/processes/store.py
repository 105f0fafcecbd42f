"""The process group's store in one session: values, errors, and which processes are alive."""

import io
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor

from captum_llm_ext import _compat
from captum_llm_ext.model.processes.connection import Connections

# Seconds between heartbeats, sent by a separate thread even while a process computes. Chosen, not
# measured.
_BEAT = 1.0
# Seconds without a heartbeat after which a process is given up; chosen, not measured.
_SILENCE = 60.0
# Seconds to wait after a connection has ended: the process may have finished before. Chosen, not
# measured.
_ENDED = 3.0
# Bytes: torch's store takes values of up to 8 MiB.
_PIECE = 4 << 20
_COUNT = 4  # bytes for the number of pieces that follow the first
# Seconds between two looks at the store; chosen, not measured.
_SHORTEST_NAP, _LONGEST_NAP = 0.0005, 0.02
# Seconds that a failed process waits for the others to learn of it, before it may end the run.
# Chosen, not measured.
_FAREWELL = 5.0
# Seconds that a process may stay in a pass after another one has failed. Chosen, not measured.
_STUCK = 30.0


class Backoff:
    """Waits with increasing intervals while nothing happens."""

    def __init__(self) -> None:
        self._seconds = _SHORTEST_NAP

    def take(self) -> None:
        """Waits."""
        time.sleep(self._seconds)
        self._seconds = min(1.5 * self._seconds, _LONGEST_NAP)

    def over(self) -> None:
        """Resets the interval."""
        self._seconds = _SHORTEST_NAP


class Store:
    """The store in one session: its keys, errors, and which processes are alive."""

    def __init__(
        self, name: str, ranks: Sequence[int], rank: int, what: str, replica: Sequence[int]
    ) -> None:
        self._store = _compat.process_store(name)
        self._join_within = _compat.process_timeout()
        self.rank = rank
        self._partners = [other for other in replica if other != rank]
        self.has_parted = False
        self._ranks, self._what = ranks, what
        # Keys to remove at the end, in order, with the number of further pieces.
        self._keys: dict[str, int] = {}
        self._connections = Connections()
        self._last_beats: dict[int, tuple[Any, float]] = {}
        self._began = time.monotonic()
        self._looked = 0.0
        self._raised: BaseException | None = None
        self._n_gone = 0

    def set(self, key: str, value: Any) -> None:
        """Sets a value of any size."""
        first, *others = _pieces(value)
        self._keys[key] = len(others)
        with self._reached():
            for i, piece in enumerate(others):
                self._store.set(f"{key}/piece {i}", piece)
            self._store.set(key, first)  # set last: a reader of it finds all pieces

    def forget(self, key: str) -> None:
        """Removes a value that is no longer needed."""
        with self._reached():
            self._delete(key)
        self._keys.pop(key, None)

    def _delete(self, key: str) -> None:
        self._store.delete_key(key)
        for i in range(self._keys.get(key, 0)):
            self._store.delete_key(f"{key}/piece {i}")

    def get(self, key: str) -> Any:
        """A value that has been set."""
        with self._reached():
            first = self._store.get(key)
            n = int.from_bytes(first[:_COUNT], "little")
            parts = [first[_COUNT:], *(self._store.get(f"{key}/piece {i}") for i in range(n))]
        return pickle.loads(b"".join(parts))

    def has(self, key: str) -> bool:
        """Whether a value has been set."""
        with self._reached():
            return bool(self._store.check([key]))

    def count(self, key: str) -> int:
        """Increments a counter; each result goes to one process only."""
        self._keys[key] = 0
        with self._reached():
            return int(self._store.add(key, 1))

    def wait_for(self, key: str, rank: int) -> Any:
        """A value that a process sets."""
        self._wait(key, rank)
        return self.get(key)

    def _wait(self, key: str, rank: int) -> None:
        nap = Backoff()
        while not self.has(key):
            self.watch(rank)
            nap.take()

    def watch(self, rank: int) -> None:
        """Raises if a process has failed, or the one waited for has died."""
        now = time.monotonic()
        if now - self._looked < _BEAT / 10:
            return
        self._looked = now
        self.check()
        key = f"beat/{rank}"
        beat = self.get(key) if self.has(key) else None
        last, since = self._last_beats.get(rank, (None, self._began))
        if beat != last:
            self._last_beats[rank] = (beat, now)
            return
        if beat is not None and now - since > self._patience(beat):
            self._n_gone = 1
            raise RuntimeError(
                f"rank {rank} has not reported for {now - since:.0f} seconds during "
                f"{self._what}: its process is gone or stopped."
            )
        if beat is None and now - since > self._join_within:
            raise RuntimeError(
                f"rank {rank} has not begun {self._what} within {self._join_within:.0f} seconds, "
                f"which rank {self.rank} waits for: every process has to call it, in the same "
                "order."
            )

    def _patience(self, beat: tuple[int, Any]) -> float:
        """Seconds without a heartbeat after which a process is given up."""
        return min(_ENDED, _SILENCE) if self._connections.has_ended(beat[1]) else _SILENCE

    def check(self) -> None:
        """Raises an error of another process."""
        if not self.has("error"):
            return
        rank, error, trace = cast(tuple[int, BaseException, str], self.get("error"))
        if rank == self.rank:
            return
        error.add_note(f"Raised on rank {rank} of {len(self._ranks)}, where it was:\n{trace}")
        self._raised = error
        raise error

    def tell_error(self, error: BaseException) -> BaseException:
        """Sends an error of this process, and waits briefly until the others have it.

        Returns:
            The error to raise: another process's, if this one is only its consequence.
        """
        with suppress(RuntimeError):  # the store may be gone already
            if error is not self._raised and self._partners and isinstance(error, RuntimeError):
                # A pass that another process left ends in a connection error.
                try:
                    self.check()
                except BaseException as cause:
                    error = cause
            if error is self._raised:
                self._store.add("knows error", 1)
                return error
            error.add_note(
                f"Raised on rank {self.rank} of {len(self._ranks)} ({socket.gethostname()})."
            )
            if self.count("errors") > 1:
                self._store.add("knows error", 1)
                return error
            trace = "".join(traceback.format_exception(error))
            self.set("error", (self.rank, _as_sent(error), trace))
            until, nap = time.monotonic() + _FAREWELL, Backoff()
            while time.monotonic() < until:
                if self._store.add("knows error", 0) >= len(self._ranks) - 1 - self._n_gone:
                    return error
                nap.take()
            if self._partners:
                self.has_parted = True
                error.add_note(
                    f"Rank {self.rank} holds the model together with {self._partners}, some of "
                    "which are still in a pass: end this process, they end with it."
                )
        return error

    def leave(self) -> None:
        """Waits for all to reach the end."""
        with self._reached():
            self._store.set(f"left/{self.rank}", b"")
        for rank in self._ranks:
            self._wait(f"left/{rank}", rank)

    def clear(self) -> None:
        """Removes everything from the store, after `leave`."""
        with suppress(RuntimeError):  # finished: errors no longer matter
            for key in self._keys:
                self._delete(key)
            self._store.add("gone", 1)
            if self.rank != self._ranks[0]:
                return
            # The process that hosts the store must not end while others still use it.
            until, nap = time.monotonic() + _FAREWELL, Backoff()
            while time.monotonic() < until:
                if self._store.add("gone", 0) >= len(self._ranks):
                    # Others may have checked whether a process is alive.
                    for rank in self._ranks:
                        self._store.delete_key(f"left/{rank}")
                        self._store.delete_key(f"beat/{rank}")
                    self._store.delete_key("gone")
                    return
                nap.take()

    @contextmanager
    def beating(self) -> Generator[None]:
        """Runs a thread that sends heartbeats."""
        stop = threading.Event()
        since: dict[Any, Any] = {}
        key = f"beat/{self.rank}"

        def beat() -> None:
            n = 0
            with suppress(RuntimeError):  # the main thread will notice and report it
                while not stop.wait(_BEAT if n else 0):
                    n += 1
                    [piece] = _pieces((n, self._connections.address))
                    self._store.set(key, piece)
                    if self._partners:
                        self._end_if_stuck(since)

        thread = threading.Thread(target=beat, daemon=True, name="captum-llm-ext beat")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._connections.close()

    def _end_if_stuck(self, since: dict[Any, Any]) -> None:
        """Exits the process if its main thread is in a pass that others will never join.

        A thread that waits in a collective cannot be interrupted by an exception.

        Args:
            since: Times of first observation, kept by the caller.
        """
        now = time.monotonic()
        if self.has("error"):
            rank, error, trace = cast(tuple[int, BaseException, str], self.get("error"))
            if rank == self.rank or now - since.setdefault("error", now) < _STUCK:
                return
            reason = f"rank {rank} failed ({type(error).__name__}: {error})\n{trace}"
        else:
            gone, silent = None, 0.0
            for partner in self._partners:
                beat = self.get(f"beat/{partner}") if self.has(f"beat/{partner}") else None
                last, since_beat = since.get(partner, (None, now))
                since[partner] = (beat, now if beat != last else since_beat)
                if beat is not None and beat == last and now - since_beat > self._patience(beat):
                    gone, silent = partner, now - since_beat
            if gone is None:
                return
            reason = f"rank {gone} has not reported for {silent:.0f} seconds"
        print(
            f"captum-llm-ext: rank {self.rank} ends itself during {self._what}: it is in a pass "
            f"that it shares with rank {self._partners}, and {reason}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    @contextmanager
    def _reached(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own are all RuntimeErrors
            raise RuntimeError(
                f"the store of the process group cannot be reached from rank {self.rank} during "
                f"{self._what} ({str(error).splitlines()[0]}): the process that held it has ended, "
                "most likely because it failed."
            ) from error


def _pieces(value: Any) -> list[bytes]:
    """A value in pieces for the store; the first begins with the number of the others."""
    content = io.BytesIO()
    _Pickler(content, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    whole = content.getbuffer()
    cuts = range(_PIECE, len(whole), _PIECE)
    first = len(cuts).to_bytes(_COUNT, "little") + whole[:_PIECE]
    return [first, *(bytes(whole[at : at + _PIECE]) for at in cuts)]


class _Pickler(pickle.Pickler):
    """Pickles of a tensor only its own elements, not the storage that it is a view of."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized:
            return NotImplemented
        flat: Any = obj.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (bytearray(flat.numpy()), obj.dtype, tuple(obj.shape))


def _tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def _as_sent(error: BaseException) -> BaseException:
    """The error, or a picklable replacement, of the same class if possible."""
    with suppress(Exception):
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            copy.__notes__ = []
            return copy
    for kind in type(error).__mro__:
        with suppress(Exception):
            copy = cast(BaseException, kind(str(error)))
            pickle.loads(pickle.dumps(copy))
            return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
