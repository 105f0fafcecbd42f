"""Models by name, and what goes wrong with names."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from captum_llm_ext import _compat
from captum_llm_ext.cli import torchrun as together
from captum_llm_ext.cli.command import UsageError, say
from captum_llm_ext.demo import folder

DEMO = "demo"
_MAIN = "main"  # of every repository
_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
_ADVICE = (
    f"give '{DEMO}' (the tiny model that comes with the package), the name of a Hugging Face "
    "causal language model, or a folder written by `save_pretrained`."
)


def add_loading(parser: Any) -> None:
    """Adds the options that say how a model is loaded."""
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="as of transformers: cpu, cuda:0, auto, or a JSON object (default: cuda:0 where there "
        "is one, else cpu)",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="of a Hugging Face name: its branch, tag or commit (default: main)",
    )


def location(name: str, revision: str | None = None) -> str:
    """Where transformers finds a model that goes by this name here.

    Raises:
        UsageError: If a revision is asked of what has none.
        ValueError: If the name is of a place that holds no model.
    """
    if revision is not None and (name == DEMO or Path(name).expanduser().is_dir()):
        raise UsageError(
            f"--revision would be ignored: {name!r} comes with the package or is a folder, which "
            "holds one revision alone."
        )
    if name == DEMO:
        return str(folder())
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {name!r} holds no model (no config.json): {_ADVICE}")
        return str(path)
    if path.is_file():
        raise ValueError(f"the model {name!r} is a file: give the folder that it lies in.")
    if not name.strip() or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ValueError(f"there is no model folder {name!r}: {_ADVICE}")
    return name


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        UsageError, ValueError: If it cannot be loaded.
    """
    place = location(name, revision)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    if Path(place).is_dir():  # downloads, which take longer, keep their bars
        logging.disable_progress_bar()
    try:
        load = AutoTokenizer.from_pretrained
        return _loaded("tokenizer", name, load, place, revision=revision or _MAIN)
    except ValueError as error:  # it is what is loaded first: most often the name is wrong
        raise ValueError(f"{error} {_ADVICE[0].upper()}{_ADVICE[1:]}") from error


def load_model(name: str, arguments: argparse.Namespace) -> Any:
    """A model in evaluation mode, as the options of `add_loading` say.

    Raises:
        UsageError, ValueError: If it cannot be loaded.
    """
    place = location(name, arguments.revision)
    from transformers import AutoModelForCausalLM

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device_map = _device_map(arguments.device_map)
    if device_map is None and torch.cuda.is_available() and name != DEMO:
        # The tiny model is faster without. torchrun numbers the processes of a machine.
        device_map = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if together.is_main():
        say(f"loading {name} …")
    load = AutoModelForCausalLM.from_pretrained
    revision = arguments.revision or _MAIN
    model = _loaded(
        "model", name, load, place, dtype=dtype, device_map=device_map, revision=revision
    )
    _compat.note_revision(model, revision)
    return model.eval()


def _device_map(given: str | None) -> Any:
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"--device-map {given!r} is no JSON ({error}).") from error


def _loaded(what: str, name: str, load: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return load(*arguments, **named)
    except Exception as error:  # whatever a name, a file or a remote place may cause
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"the {what} of {name!r} cannot be loaded: {said}.") from error
