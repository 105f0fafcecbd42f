"""Kernels of notebooks, forked from a process that has imported everything, which takes seconds.

Run as a script it is that process: it forks a kernel for each line of JSON that it reads.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Kernels:
    """Starts kernels in place of `jupyter_client.launcher.launch_kernel`."""

    def __init__(self):
        # The backend that ipykernel chooses, which matplotlib reads when it is imported.
        inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | inline | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def launch(self, command, *, env, cwd=None, **_):
        """A kernel with the arguments of a command ``python -m ipykernel_launcher …``."""
        arguments = command[command.index("-f") :]
        request = {"arguments": arguments, "environment": dict(env), "folder": cwd}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Kernel(int(self._process.stdout.readline()))

    def close(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Kernel:
    """What `jupyter_client` uses of a `subprocess.Popen`."""

    stdin = stdout = stderr = None
    returncode = None

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout=60):
        ends = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < ends:
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve():
    import accelerate  # noqa: F401
    import captum.attr  # noqa: F401
    import ipykernel.zmqshell  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers
    from ipykernel.kernelapp import IPKernelApp

    import captum_llm_ext

    torch.set_num_threads(1)
    for name in captum_llm_ext.__all__:
        getattr(captum_llm_ext, name)
    _ = transformers.LlamaForCausalLM
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # kernels that have ended are nobody's to wait for
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid:
            # Before anyone asks: whoever ends the kernel's group must not end this one's.
            os.setpgid(pid, pid)
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or notebooks' own commands have no status
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(null, stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"] or Path.cwd())
        # As of an interactive session: no script's folder on the path.
        sys.path[0] = ""
        sys.argv = ["ipykernel_launcher", *request["arguments"]]
        IPKernelApp.launch_instance()
        os._exit(0)


if __name__ == "__main__":
    serve()
