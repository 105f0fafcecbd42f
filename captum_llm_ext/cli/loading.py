"""Loads models and tokenizers by name, with clear errors."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from captum_llm_ext.cli import torchrun as together
from captum_llm_ext.cli.command import UsageError, say
from captum_llm_ext.cli.input_files import check_there
from captum_llm_ext.cli.quantizing import HELP as QUANTIZE
from captum_llm_ext.cli.quantizing import quantization
from captum_llm_ext.demo import NAME as DEMO
from captum_llm_ext.demo import folder

_MAIN = "main"  # default branch of repositories
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]*\w)?", re.ASCII)
# The form of a device or of a placement ("auto"): torch knows the names, and may learn new ones.
_DEVICE = re.compile(r"[a-z_0-9]+(:\d+)?")
_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
_ADVICE = (
    f"give '{DEMO}' (the tiny model that comes with the package), the name of a Hugging Face "
    "causal language model, or a folder written by `save_pretrained`."
)


def add_loading(parser: Any) -> None:
    """Adds the options on loading a model."""
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="dtype of the weights (default: as stored)",
    )
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="as in transformers: cpu, cuda:0, auto, or a JSON object (default: cuda:0 where "
        "there is one, else cpu)",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a Hugging Face name (default: main)",
    )
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        help="weights and tokenizer in a file of llama.cpp, in place of a model's name, or a "
        "file of that name in the folder of --model; computed in --dtype (default: float32)",
    )
    parser.add_argument(
        "--quantize",
        metavar="HOW",
        help=QUANTIZE,
    )


class Place(NamedTuple):
    """Location of a model.

    Attributes:
        shown: Displayed name.
        where: Path or name for transformers.
        revision: Revision of `where`.
        gguf: The GGUF file there; None for an ordinary checkpoint.
    """

    shown: str
    where: str
    revision: str | None = None
    gguf: str | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` besides `where`."""
        own = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"revision": self.revision or _MAIN, **own}


def place_of(arguments: argparse.Namespace) -> Place:
    """Location of the model selected by the options of `add_loading`; nothing is loaded.

    Raises:
        UsageError: If options contradict one another, or there is no model.
        ValueError: If a required package is missing.
    """
    name, gguf = arguments.model, arguments.gguf
    if gguf is not None and arguments.quantize is not None:
        raise UsageError("--quantize would be ignored: the weights in --gguf are quantized.")
    quantization(arguments.quantize)
    _device_map(arguments.device_map)
    if gguf is None:
        if name is None:
            raise UsageError(f"required: --model NAME, or --gguf FILE; as NAME {_ADVICE}")
        return Place(name, location(name, arguments.revision), arguments.revision)
    if Path(gguf).suffix != ".gguf":
        raise UsageError(f"--gguf {gguf}: give a file that ends in .gguf.")
    if name is None:
        path = Path(gguf).expanduser()
        check_there("--gguf", str(path), shown=gguf)
        _check_magic(path)
        if arguments.revision is not None:
            raise UsageError("--revision would be ignored: --gguf is a file.")
        place = Place(path.stem, str(path.parent), None, path.name)
    elif name == DEMO:
        raise UsageError(f"--model {DEMO} would be ignored: --gguf is a model itself.")
    else:
        if Path(name).expanduser().is_dir() and not (Path(name).expanduser() / gguf).is_file():
            raise UsageError(f"--gguf {gguf}: there is no such file in {name}.")
        where = location(name, of_gguf=True)
        if Path(where).is_dir():
            _check_magic(Path(where) / gguf)
        place = Place(f"{name} ({gguf})", where, arguments.revision, gguf)
    lacking = [package for package in ("gguf", "sentencepiece") if find_spec(package) is None]
    if lacking:
        raise ValueError(f"--gguf needs more packages: pip install {' '.join(lacking)}")
    return place


def location(name: str, revision: str | None = None, *, of_gguf: bool = False) -> str:
    """Path or hub name under which transformers finds a model.

    Args:
        name: As given.
        revision: Of a hub name.
        of_gguf: Whether a file there holds it all.

    Raises:
        UsageError: If a revision is given for a local model, or there is no model at a path.
    """
    if revision is not None and (name == DEMO or Path(name).expanduser().is_dir()):
        raise UsageError(
            f"--revision would be ignored: {name!r} comes with the package or is a folder, which "
            "has one revision only."
        )
    if name == DEMO:
        return str(folder())
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not of_gguf and not (path / "config.json").is_file():
            raise UsageError(f"the folder {name!r} holds no model (no config.json): {_ADVICE}")
        return str(path)
    if path.is_file():
        raise UsageError(f"the model {name!r} is a file: give the folder that contains it.")
    if not _HUB_NAME.fullmatch(name):
        raise UsageError(f"there is no model folder {name!r}: {_ADVICE}")
    return name


def _check_magic(path: Path) -> None:
    """Checks that a file begins as llama.cpp's do.

    Raises:
        UsageError: If it does not.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"--gguf {path.name}: that is not a GGUF file.")


def load_tokenizer(place: Place) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Downloads take longer and keep their bars on a terminal.
    if Path(place.where).is_dir() or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        load = AutoTokenizer.from_pretrained
        return _loaded("tokenizer", place.shown, load, place.where, **place.named)
    except ValueError as error:  # loaded first: usually the name is wrong
        raise ValueError(f"{error} {_ADVICE[0].upper()}{_ADVICE[1:]}") from error


def load_model(place: Place, arguments: argparse.Namespace) -> Any:
    """A model in evaluation mode, loaded by the options of `add_loading`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from captum_llm_ext import _compat

    default = "auto" if place.gguf is None else torch.float32
    dtype = default if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device_map = _device_map(arguments.device_map)
    if device_map is None and torch.cuda.is_available() and place.shown != DEMO:
        # The tiny model is faster without it. torchrun numbers the processes of a machine.
        device_map = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if together.is_main():
        say(f"loading {place.shown} …")
    named: dict[str, Any] = {"dtype": dtype, "device_map": device_map, **place.named}
    if arguments.quantize is not None:
        named["quantization_config"] = quantization(arguments.quantize)
    load = AutoModelForCausalLM.from_pretrained
    model = _loaded("model", place.shown, load, place.where, **named)
    if place.shown == DEMO:
        model.config.name_or_path = DEMO
    _compat.note_revision(model, place.revision or _MAIN)
    return model.eval()


def _device_map(given: str | None) -> Any:
    if given is None or not given.lstrip().startswith("{"):
        if given is not None and not _DEVICE.fullmatch(given):
            raise UsageError(f"--device-map {given}: give cpu, cuda:0, auto, or a JSON object.")
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise UsageError(f"--device-map {given!r} is not JSON ({error}).") from error


def _loaded(what: str, name: str, load: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    # Progress bars are useless in a file; errors are exceptions.
    is_seen = sys.stderr.isatty()
    hidden = nullcontext() if is_seen else redirect_stderr(io.StringIO())
    try:
        with hidden:
            return load(*arguments, **named)
    except Exception as error:  # a name, a file or a remote place may raise anything
        message = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"the {what} of {name!r} cannot be loaded: {message}.") from error
