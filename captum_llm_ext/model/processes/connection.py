"""Whether another process is gone: a connection ends with it, however it ends."""

import os
import socket
import threading
from contextlib import suppress

# Seconds. Processes of one machine or network connect within milliseconds; one behind a wall that
# drops packets costs every other process so much, once.
_CONNECTED_WITHIN = 0.5

Address = tuple[str, str, int]


class Connections:
    """A port of this process, at which nobody answers, and connections to those of others.

    The system takes connections in, and ends them with the process. Where they cannot be made
    (other machines behind a wall), nothing is told.

    Attributes:
        address: The machine's name, its address and the port; None where there is none.
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
        """Whether the process that had this address is gone, or has closed its port.

        Args:
            address: As it told it; None for one that told none.
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
    """The address by which this machine is reached from where the process group meets."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    family, kind, _, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as unsent:
        unsent.connect(address)  # sends nothing, finds the way
        return family, unsent.getsockname()[0]


def _is_at_end(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
