"""Several processes as one: decisions are equal on all, work is distributed.

Everything uses the store of the process group, a small server that all processes can reach, not its
collectives. So no process waits in a collective while another computes, the group's timeout ends no
long run, and the backend does not matter.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

from torch import nn

from captum_llm_ext import _compat
from captum_llm_ext.base.warning import warn_user
from captum_llm_ext.model.processes.agreement import parting_checks
from captum_llm_ext.model.processes.store import Backoff, Store

S = TypeVar("S")
T = TypeVar("T")

# Seconds that processes of a replica wait for each other after one ran out of memory. Chosen, not
# measured.
_TOGETHER = 30.0
# Number of later messages after which a replica's internal message is removed from the store.
# Chosen, not measured.
_REMEMBERED = 256
# Sessions are numbered, equally on all processes.
_numbers: Counter[tuple[int, ...]] = Counter()
# Replicas whose processes are no longer in the same pass.
_parted: set[tuple[int, ...]] = set()


class Accelerator(Protocol):
    """The part of accelerate's `Accelerator` that is used (its `PartialState` has it as well)."""

    @property
    def num_processes(self) -> int:
        """Number of processes."""
        ...

    @property
    def process_index(self) -> int:
        """Index of this process."""
        ...


class Processes:
    """The processes that work together, including this one.

    Several of them may hold one model together (tensor parallel): such a replica takes work as one,
    and its processes run the same passes. The first process of a replica sends its results.

    Args:
        ranks: Ranks in the process group, the same on all of them.
        replicas: The ranks in groups that hold a model together; by default each its own.

    Attributes:
        ranks: As given.
        rank: Rank of this process.
    """

    def __init__(
        self, ranks: Sequence[int] = (0,), replicas: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.ranks = tuple(ranks)
        self._replicas = [tuple(r) for r in replicas or [[rank] for rank in ranks]]
        self.rank = _compat.process_rank() if self.are_several else ranks[0]
        self._own = next(i for i, ranks in enumerate(self._replicas) if self.rank in ranks)
        self._store: Store | None = None
        self._n = self._n_failed = 0

    @classmethod
    def of(cls, accelerator: Accelerator | None, model: nn.Module) -> "Processes":
        """The processes of an accelerator, or of a model that several hold together.

        Raises:
            TypeError: If it is not an accelerator.
            ValueError: If there are several processes and no process group, or a replica of the
                model is not among them.

        Warns:
            UserWarning: If the accelerator reports one process and the environment asks for more.
        """
        together = _compat.model_ranks(model)
        if accelerator is None:
            return cls(together, [together]) if together else cls()
        n, rank = (getattr(accelerator, name, None) for name in ("num_processes", "process_index"))
        if not isinstance(n, int) or not isinstance(rank, int):
            raise TypeError(
                f"`accelerator` is a {type(accelerator).__name__}: give an `accelerate.Accelerator`"
                ", or leave it out."
            )
        if n == 1:
            _warn_alone()
            return cls(together, [together]) if together else cls()
        if not _compat.has_process_group():
            raise ValueError(
                f"the accelerator has {n} processes and there is no torch process group: start the "
                "script with `torchrun`."
            )
        ranks = range(n)
        replicas = _compat.all_gathered(together) if together else [[one] for one in ranks]
        replicas = sorted({tuple(sorted(replica)) for replica in replicas})
        if sorted(rank for replica in replicas for rank in replica) != list(ranks):
            raise ValueError(
                f"the model is sharded across the processes {replicas}, which are not {n} in "
                "groups: load it the same way on every process."
            )
        return cls(ranks, replicas)

    @property
    def n_replicas(self) -> int:
        """Number of models that work at the same time."""
        return len(self._replicas)

    @property
    def number(self) -> int:
        """The index of this process's replica, from 0."""
        return self._own

    @property
    def are_several(self) -> bool:
        """Whether there is another process than this one."""
        return len(self.ranks) > 1

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == self.ranks[0]

    @property
    def leads(self) -> bool:
        """Whether this process sends for its replica."""
        return self.rank == self._replicas[self._own][0]

    @property
    def have_diverged(self) -> bool:
        """Whether the processes of this replica are permanently no longer in the same pass."""
        return self._replicas[self._own] in _parted

    def replica(self) -> "Processes":
        """The processes of this replica, by themselves."""
        own = self._replicas[self._own]
        return Processes(own, [own])

    @contextmanager
    def session(self, what: str) -> Generator[None]:
        """A section that all processes run together.

        An error on one is raised on all, with a note on its origin.

        Args:
            what: A name for messages.

        Raises:
            RuntimeError: If a process has died, or does not arrive.
        """
        if not self.are_several or self._store is not None:  # alone, or within a session
            yield
            return
        own = self._replicas[self._own]
        if own in _parted:
            raise RuntimeError(
                f"the processes {list(own)} hold a model together, and one of them failed in the "
                "middle of a pass: their states are no longer consistent. Restart them."
            )
        number = _numbers[self.ranks]
        _numbers[self.ranks] += 1
        name = f"captum_llm_ext/{'-'.join(map(str, self.ranks))}/{number}"
        self._store = store = Store(name, self.ranks, self.rank, what, own)
        self._n = self._n_failed = 0
        parting_checks.append(self._failed_on_all)
        try:
            with store.beating():
                yield
                store.leave()
            store.clear()
        except BaseException as error:
            raised = store.tell_error(error)
            if store.has_parted:
                _parted.add(own)
            if raised is not error:
                raise raised from error
            raise
        finally:
            parting_checks.remove(self._failed_on_all)
            self._store = None

    def _failed_on_all(self) -> bool:
        """Whether all processes of this replica failed in the same pass."""
        own, store = self._replicas[self._own], self._store
        if store is None or len(own) == 1:
            return True
        self._n_failed += 1
        name = f"failed/{self._own}/{self._n_failed}"
        store.set(f"{name}/{self.rank}", True)
        until, nap = time.monotonic() + _TOGETHER, Backoff()
        while not all(store.has(f"{name}/{rank}") for rank in own):
            if time.monotonic() > until:
                return False
            store.check()
            nap.take()
        return True

    def decide(self, function: Callable[[], T]) -> T:
        """The result of the first replica's function, on all processes.

        The function is called on all processes of the first replica only, so that it may run the
        model.
        """
        store = self._store
        if store is None:
            return function()
        key = self._next("decided")
        found = function() if self._own == 0 else None
        if self.is_main:
            store.set(key, found)
        return cast(T, store.wait_for(key, self.ranks[0]))

    def minimum(self, number: int) -> int:
        """The minimum of a number over the processes."""
        store = self._store
        if store is None:
            return number
        key = self._next("number")
        store.set(f"{key}/{self.rank}", number)
        return min(cast(int, store.wait_for(f"{key}/{rank}", rank)) for rank in self.ranks)

    def each(self, items: Sequence[S], function: Callable[[S], T]) -> list[T]:
        """A function's result for each item, on all processes; one replica calls it for each."""
        work = self.work()
        for number in work.take(len(items)):
            work.send((number, function(items[number])))
        work.end()
        found: dict[int, T] = dict(work.rest())
        return [found[number] for number in range(len(items))]

    def work(self) -> "Work":
        """A piece of work to distribute; every process begins it at the same point."""
        return Work(self._store, self._next("work"), self._replicas, self._own, self.leads)

    def _next(self, what: str) -> str:
        self._n += 1
        return f"{what}/{self._n}"


class Work:
    """A piece of work in shares, each taken by one replica, with results sent to all.

    The order of calls is `take` to its end, `end`, `rest`; `send` and `received` in between.

    Attributes:
        n_sent: Number of messages received so far, by replica.
        failures: Errors passed to `end`; known after `rest`.
    """

    def __init__(
        self,
        store: Store | None,
        name: str,
        replicas: Sequence[tuple[int, ...]],
        own: int,
        leads: bool,
    ) -> None:
        self._store, self._name, self._own, self._leads = store, name, own, leads
        self._leaders = [ranks[0] for ranks in replicas]
        self._replica = replicas[own]
        self._is_lone = len(self._replica) == 1
        self.n_sent = [0] * len(replicas)
        self.failures: list[Any] = []
        self._inbox: list[Any] = []
        self._n_own = self._n_agreed = 0

    def take(self, n: int | None = None) -> Iterator[int]:
        """Yields indices from 0 below `n` for this replica, as it becomes free.

        Ends early if a replica failed.
        """
        count = 0
        while True:
            number = self._next_number(count)
            count += 1
            if (n is not None and number >= n) or self._failed():
                return
            yield number

    def _next_number(self, count: int) -> int:
        if self._store is None:
            return count
        store = self._store
        return self.agree(lambda: store.count(f"{self._name}/next") - 1)

    def agree(self, function: Callable[[], T]) -> T:
        """The result of a function on the first process of this replica, on all of them."""
        store = self._store
        if store is None or self._is_lone:
            return function()
        name, n = f"{self._name}/agreed/{self._own}", self._n_agreed
        self._n_agreed += 1
        if self._leads:
            found = function()
            store.set(f"{name}/{n}", found)
        else:
            found = cast(T, store.wait_for(f"{name}/{n}", self._leaders[self._own]))
        if (n + 1) % _REMEMBERED == 0:
            self._forget(store, name, n)
        return found

    def _forget(self, store: Store, name: str, n: int) -> None:
        """Removes from the store what all processes of this replica have read."""
        if not self._leads:
            store.set(f"{name}/{n}/read by {store.rank}", True)
            return
        for rank in self._replica[1:]:
            store.wait_for(f"{name}/{n}/read by {rank}", rank)
            store.forget(f"{name}/{n}/read by {rank}")
        for i in range(n + 1 - _REMEMBERED, n + 1):
            store.forget(f"{name}/{i}")

    def _failed(self) -> bool:
        # A replica of several processes must stay together: all continue, or none.
        return self._store is not None and self._is_lone and self._store.has(f"{self._name}/failed")

    def send(self, message: Any) -> None:
        """Sends a result to all, including this replica's own processes."""
        if not self._leads:
            return
        if self._store is not None:
            self._store.set(f"{self._name}/{self._own}/{self._n_own}", message)
        self._n_own += 1
        self.n_sent[self._own] += 1
        self._inbox.append(message)

    def received(self) -> list[Any]:
        """Messages since the last call, without waiting."""
        if self._store is not None:
            self._store.check()
            for replica in self._others():
                while self._store.has(key := f"{self._name}/{replica}/{self.n_sent[replica]}"):
                    self._inbox.append(self._store.get(key))
                    self.n_sent[replica] += 1
        inbox, self._inbox = self._inbox, []
        return inbox

    def end(self, failure: Any = None) -> None:
        """Declares this replica finished, or failed, in which case the others stop too."""
        if self._store is None:
            self.failures += [] if failure is None else [failure]
            return
        if failure is not None:
            self._store.set(f"{self._name}/failed", True)
            if not self._is_lone:
                self._check_together(self._store)
        if self._leads:
            self._store.set(f"{self._name}/end/{self._own}", (self._n_own, failure))

    def _check_together(self, store: Store) -> None:
        """Raises unless all processes of this replica failed: others may wait in a pass forever."""
        store.set(f"{self._name}/failed/{store.rank}", True)
        until, nap = time.monotonic() + _TOGETHER, Backoff()
        for rank in self._replica:
            while not store.has(f"{self._name}/failed/{rank}"):
                store.watch(rank)
                if time.monotonic() > until:
                    raise RuntimeError(
                        f"rank {store.rank} failed in a pass that rank {rank}, which holds the "
                        "model together with it, went on with: nothing can be asked of them any "
                        "more. Where it ran out of memory, give a smaller `perturbations_per_eval`."
                    )
                nap.take()

    def rest(self) -> Iterator[Any]:
        """Remaining messages until all replicas are finished; waits for them."""
        yield from self.received()
        if self._store is None:
            return
        found: dict[int, Any] = {}
        nap = Backoff()
        while len(found) < len(self._leaders):
            messages = self.received()
            yield from messages
            nap.over() if messages else nap.take()
            for replica, leader in enumerate(self._leaders):
                if replica in found:
                    continue
                self._store.watch(leader)
                key = f"{self._name}/end/{replica}"
                if self._store.has(key):
                    n, failure = cast(tuple[int, Any], self._store.get(key))
                    if self.n_sent[replica] == n:
                        found[replica] = failure
        self.failures = [found[i] for i in sorted(found) if found[i] is not None]

    def _others(self) -> Iterable[int]:
        return (i for i in range(len(self._leaders)) if i != self._own or not self._leads)


def _warn_alone() -> None:
    """Warns if more than one process was requested, but there is one."""
    asked = os.environ.get("WORLD_SIZE", "1")
    if asked.isdigit() and int(asked) > 1:
        warn_user(
            f"the accelerator reports one process, the environment requests {asked}: each of them "
            "does all of the work. Without a GPU, say `Accelerator(cpu=True)`.",
        )
    elif "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # accelerate 1.15 (2026) sets the address where --num_processes is above 1, and starts one.
        warn_user(
            "the accelerator reports one process, although `accelerate launch` requested more: "
            "with --cpu it starts only one. Start the script with `torchrun --standalone "
            "--nproc_per_node 2` and say `Accelerator(cpu=True)`.",
        )
