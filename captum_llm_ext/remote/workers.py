"""Concurrent requests in threads that end with the run."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

# Seconds for requests under way to finish after another one has failed, since they are paid for.
# Chosen, not measured.
_GRACE = 10.0
# Seconds to wait for interrupted threads. Chosen, not measured.
_FAREWELL = 2.0


def do_all(
    jobs: Sequence[S],
    work: Callable[[S], T],
    take: Callable[[S, T], None],
    *,
    n_threads: int,
    interrupt: Callable[[], None],
) -> None:
    """Runs jobs in threads; results are handled in the calling thread as they arrive.

    After an error no further job begins; results of running jobs are still handled, if they arrive
    soon. Ctrl-C interrupts them immediately. Threads are daemons, so none keeps a program from
    ending.

    Args:
        jobs: The jobs, in order.
        work: Runs one job; called from several threads, unless `n_threads` is 1.
        take: Called with a job and its result, in the calling thread.
        n_threads: Maximum number of concurrent jobs.
        interrupt: Makes `work` end with an error, in all threads.

    Raises:
        Exception: The first exception of `work` or `take`.
    """
    n_threads = min(n_threads, len(jobs))
    if n_threads <= 1:
        try:
            for job in jobs:
                take(job, work(job))
        except KeyboardInterrupt:
            interrupt()
            raise
        return
    todo: queue.SimpleQueue[S] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    # A job with its result, or an error; None when a thread ends.
    done: queue.SimpleQueue[tuple[S, T] | Exception | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                job = todo.get_nowait()
                try:
                    done.put((job, work(job)))
                except Exception as error:
                    done.put(error)
        done.put(None)

    threads = [
        threading.Thread(target=run, daemon=True, name=f"captum-llm-ext request {i}")
        for i in range(n_threads)
    ]
    n_running = n_threads
    failure: Exception | None = None
    until: float | None = None
    try:
        for thread in threads:
            thread.start()
        while n_running:
            left = None if until is None else until - time.monotonic()
            try:
                message = done.get(timeout=None if left is None else max(0.0, left))
            except queue.Empty:
                break
            if message is None:
                n_running -= 1
                continue
            error = message if isinstance(message, Exception) else _taken(take, *message)
            if error is not None:
                failure = failure or error
                until = until or time.monotonic() + _GRACE
                stop.set()
    finally:
        stop.set()
        if n_running:
            interrupt()
            _join(threads)
            with suppress(queue.Empty):
                while True:
                    message = done.get_nowait()
                    if isinstance(message, tuple):
                        _taken(take, *message)
    if failure is not None:
        raise failure


def _taken(take: Callable[[S, T], None], job: S, found: T) -> Exception | None:
    """Handles a result, and returns its error, since others are still to be handled."""
    try:
        take(job, found)
    except Exception as error:
        return error
    return None


def _join(threads: Sequence[threading.Thread]) -> None:
    until = time.monotonic() + _FAREWELL
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, until - time.monotonic()))
