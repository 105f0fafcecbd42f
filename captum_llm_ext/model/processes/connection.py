"""Detects whether another process has died: its connection ends with it."""

import os
import socket
import threading
from contextlib import suppress

# Seconds. Processes on one machine or network connect within milliseconds; one behind a firewall
# that drops packets costs every other process this much, once. Chosen, not measured.
_CONNECTED_WITHIN = 0.5

Address = tuple[str, str, int]


class Connections:
    """A listening port of this process, without a service, and connections to those of others.

    The operating system accepts connections, and closes them when the process ends. If they cannot
    be made (machines behind a firewall), nothing is known.

    Attributes:
        address: The machine's name, its address and the port, or None.
    """

    def __init__(self) -> None:
        self.address: Address | None = None
        self._lock = threading.Lock()
        self._known: dict[Address, socket.socket | None] = {}
        self._ended: set[Address] = set()
        self._port: socket.socket | None = None
        with suppress(OSError):
            family, host = _own_host()
            self._port = socket.socket(family, socket.SOCK_STREAM)
            self._port.bind((host, 0))
            self._port.listen(socket.SOMAXCONN)
            self.address = (socket.gethostname(), host, self._port.getsockname()[1])

    def has_ended(self, address: Address | None) -> bool:
        """Whether the process with this address has died, or has closed its port.

        Args:
            address: The address it sent, or None.
        """
        if address is None:
            return False
        with self._lock:
            if address not in self._known:
                self._known[address] = self._connected(address)
            connection = self._known[address]
            if connection is not None and _is_at_end(connection):
                self._ended.add(address)
            return address in self._ended

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            for one in (self._port, *self._known.values()):
                if one is not None:
                    one.close()
            self._known.clear()

    def _connected(self, address: Address) -> socket.socket | None:
        name, host, port = address
        if host in ("127.0.0.1", "::1") and name != socket.gethostname():
            return None
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECTED_WITHIN)
        except ConnectionRefusedError:
            self._ended.add(address)
            return None
        except OSError:
            return None
        connection.setblocking(False)
        return connection


def _own_host() -> tuple[int, str]:
    """The address by which the process group's store reaches this machine."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as unsent:
        unsent.connect(address)  # sends nothing, only determines the route
        return family, unsent.getsockname()[0]


def _is_at_end(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
