"""Concurrent requests in threads that end with the run."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

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
        _one_by_one(jobs, work, take, interrupt)
        return
    crew = _Crew(jobs, work, n_threads)
    failure: Exception | None = None
    try:
        failure = crew.run(take)
    finally:
        crew.dismiss(take, interrupt)
    if failure is not None:
        raise failure


def _one_by_one(
    jobs: Sequence[S],
    work: Callable[[S], T],
    take: Callable[[S, T], None],
    interrupt: Callable[[], None],
) -> None:
    """`do_all` in the calling thread."""
    try:
        for job in jobs:
            take(job, work(job))
    except KeyboardInterrupt:
        interrupt()
        raise


class _Crew(Generic[S, T]):
    """Threads that take jobs one after another until none is left or they are dismissed.

    Args:
        jobs: The jobs, in order.
        work: Runs one job.
        n_threads: Number of threads.
    """

    def __init__(self, jobs: Sequence[S], work: Callable[[S], T], n_threads: int) -> None:
        self._work, self._n_running = work, n_threads
        self._todo: queue.SimpleQueue[S] = queue.SimpleQueue()
        for job in jobs:
            self._todo.put(job)
        # A job with its result, or an error; None when a thread ends.
        self._done: queue.SimpleQueue[tuple[S, T] | Exception | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._take_jobs, daemon=True, name=f"captum-llm-ext request {i}"
            )
            for i in range(n_threads)
        ]

    def run(self, take: Callable[[S, T], None]) -> Exception | None:
        """Handles results until all threads have ended, or some time after an error.

        Args:
            take: Called with a job and its result.

        Returns:
            The first error.
        """
        failure: Exception | None = None
        until: float | None = None
        for thread in self._threads:
            thread.start()
        while self._n_running:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                message = self._done.get(timeout=left)
            except queue.Empty:
                break
            if message is None:
                self._n_running -= 1
                continue
            error = message if isinstance(message, Exception) else _taken(take, *message)
            if error is not None:
                failure = failure or error
                until = until or time.monotonic() + _GRACE
                self._stop.set()
        return failure

    def dismiss(self, take: Callable[[S, T], None], interrupt: Callable[[], None]) -> None:
        """Ends all threads, and handles what they have finished meanwhile.

        Args:
            take: Called with a job and its result.
            interrupt: Ends running jobs with an error.
        """
        self._stop.set()
        if not self._n_running:
            return
        interrupt()
        until = time.monotonic() + _FAREWELL
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        with suppress(queue.Empty):
            while True:
                message = self._done.get_nowait()
                if isinstance(message, tuple):
                    _taken(take, *message)

    def _take_jobs(self) -> None:
        with suppress(queue.Empty):
            while not self._stop.is_set():
                job = self._todo.get_nowait()
                try:
                    self._done.put((job, self._work(job)))
                except Exception as error:
                    self._done.put(error)
        self._done.put(None)


def _taken(take: Callable[[S, T], None], job: S, found: T) -> Exception | None:
    """Handles a result, and returns its error, since others are still to be handled."""
    try:
        take(job, found)
    except Exception as error:
        return error
    return None
