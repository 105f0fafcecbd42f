"""``python -m captum_llm_ext``, also run by ``captum-llm-ext``: see `captum_llm_ext.cli`."""

import os
import signal
import sys
import threading
from collections.abc import Sequence

__all__ = ["main"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; see `captum_llm_ext.cli.main`.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit status.
    """
    # Only the main thread can set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        from captum_llm_ext.cli import main as run

        return run(argv)
    # Torch takes seconds to import. An exception within an import may get lost or print a
    # traceback, and there is nothing to clean up yet.
    signal.signal(signal.SIGINT, _stop)
    try:
        from captum_llm_ext.cli import main as run
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(argv)


def _stop(*_: object) -> None:
    os.write(2, b"captum-llm-ext: interrupted\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
