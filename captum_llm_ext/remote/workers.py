"""Concurrent requests in threads that end with the run."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

# Seconds that requests under way may take after another one has failed: they are paid for.
_GRACE = 10.0
# And that threads are waited for after they were interrupted.
_FAREWELL = 2.0


def do_all(
    jobs: Sequence[S],
    work: Callable[[S], T],
    take: Callable[[S, T], None],
    *,
    n_threads: int,
    interrupt: Callable[[], None],
) -> None:
    """Runs jobs in threads; their results are handled in the calling thread as they arrive.

    After an error no further job begins; what others were at is still taken in, if it comes soon.
    Ctrl-C interrupts them at once. Threads are daemons: none of them keeps a program from ending.

    Args:
        jobs: What is to be done, in this order.
        work: Does one; called in several threads at a time, unless `n_threads` is 1.
        take: Is given a job and what came of it, in the thread that calls.
        n_threads: At most so many jobs at a time.
        interrupt: Makes `work` end with an error, in whatever thread.

    Raises:
        Exception: The first one that `work` or `take` raised.
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
    # A job with what came of it, or an error; None when a thread ends.
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
    """Takes something in, and gives back what went wrong with it: others are still to be taken."""
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
