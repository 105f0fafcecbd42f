"""Installed versions and a check of a model's values, as ``doctor`` prints them."""

import argparse
import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

import captum_llm_ext
from captum_llm_ext import _compat
from captum_llm_ext.cli.loading import Place, load_model, load_tokenizer
from captum_llm_ext.cli.outputs import as_json
from captum_llm_ext.cli.self_check import Probe, probe

# The reference of a comparison, by how the model draws at random.
_DRAWN = {
    None: "",
    "seeded": " that draws from the same seeds",
    "free": " that draws anew",
    "unseen": " (equal passes differ)",
}
_OPTIONAL = ("matplotlib", "sentencex", "datasets", "shap", "pandas")


def check_up(place: Place, arguments: argparse.Namespace) -> int:
    """Prints versions and checks of a model; returns 1 if the package's own values are wrong."""
    machine = _machine()
    if not arguments.json:
        print("\n".join(f"{name:<15} {value}" for name, value in machine.items()), flush=True)
    tokenizer = load_tokenizer(place)
    model = load_model(place, arguments)
    about = _about(place.shown, model, tokenizer)
    found = probe(model, tokenizer)
    if arguments.json:
        content = {"machine": machine, "model": about, "probe": found.to_dict()}
        print(as_json(content))
    else:
        print(f"\n{', '.join(about.values())}")
        print("\n".join(f"  {line}" for line in _lines(found)))
    return 0 if found.is_right else 1


def _machine() -> dict[str, str]:
    versions = {name: version or "" for name, version in _compat.versions().items()}
    versions["captum-llm-ext"] = captum_llm_ext.__version__
    optional = {name: _version(name) for name in _OPTIONAL}
    free = _compat.free_memory()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        **versions,
        **{name: version for name, version in optional.items() if version},
        "python": f"{platform.python_version()} on {platform.system()}",
        "cpu": threads if free is None else f"{threads}, {free / 2**30:.1f} GB free",
        "gpu": ", ".join(_gpus()) or "none",
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[str]:
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield f"{name} ({free / 2**30:.0f} of {total / 2**30:.0f} GB free)"
    if torch.backends.mps.is_available():
        yield "mps"


def _about(name: str, model: Any, tokenizer: Any) -> dict[str, str]:
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_positions = _compat.longest_sequence(model)
    has_template = getattr(tokenizer, "chat_template", None) is not None
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    revision = _compat.model_source(model)[1]
    return {
        "name": name,
        **({} if revision is None else {"revision": f"revision {revision}"}),
        "class": type(model).__name__,
        "parameters": f"{n_parameters / 1e6:,.1f} million parameters in {' and '.join(dtypes)}",
        "device": f"on {_compat.input_device(model)}",
        "positions": "no limit of positions" if n_positions is None else f"{n_positions} positions",
        "chat_template": "a chat template" if has_template else "no chat template",
    }


def _lines(found: Probe) -> Iterator[str]:
    kinds = (found.whole_error, found.shared_error, found.no_copy_error, found.packed_error)
    errors = [error for error in kinds if error is not None]
    yield (
        f"{'right' if found.is_right else 'WRONG':<6} values: within "
        f"{max(errors, key=_nan_last):.1g} nats of a plain uncached forward"
        f"{_DRAWN[found.found.draws]} on {found.n_rows} rows ({_expected(found)})"
    )
    whole = f"{_verdict(found.whole_is_exact)} {{}}: within {found.whole_error:.1g} nats"
    seen = found.found
    together = "rows in batches of one length" if seen.even else "rows in padded batches"
    yield whole.format("rows one by one" if seen.apart else together)
    if found.shared is None or found.shared_error is None:
        yield f"off    beginnings reused: {found.why_not_shared or 'every row is computed whole'}"
    else:
        yield (
            f"{_verdict(found.shared_is_exact)} beginnings reused: within "
            f"{found.shared_error:.1g} nats, {found.shared:.0%} of the positions computed"
        )
    yield _reuse_line("beginnings shared, not copied", found.no_copy_is_exact, found.no_copy_error)
    yield _reuse_line("rows packed in one sequence", found.packed_is_exact, found.packed_error)
    yield _seen("what follows a token", seen.sees_ahead, seen.ahead)
    yield _seen("other rows of a batch", seen.couples_rows, seen.coupling)
    if seen.batching is not None:
        yield f"note   asked {seen.batching}"
    moves = "the shape of a batch changes" if seen.draws is None else "another pass changes"
    yield (
        f"exact  {moves} no more than float32 rounds"
        if found.noise_floor is None
        else f"note   {moves} values by up to {found.noise_floor:.2g} nats"
    )
    exact = _verdict(found.is_right)  # both ways request the same logits
    yield {
        "positions": f"{exact} logits of the target's positions only",
        "count": f"{exact} logits of the last positions only, not of single ones",
    }.get(found.logits or "", "off    logits of single positions: all of them are computed")
    yield _captum_line(found)


def _expected(found: Probe) -> str:
    """How far values may differ from plain forward passes."""
    if found.limit > found.rounding:
        return f"passes that draw anew: {found.limit:.2g} nats apart"
    return f"rounding in {found.dtype}: {found.rounding:.2g}"


def _reuse_line(name: str, is_exact: bool | None, error: float | None) -> str:
    if error is None:
        return f"off    {name}: not with this model"
    return f"{_verdict(is_exact)} {name}: within {error:.1g} nats"


def _seen(what: str, changes: bool, much: float | None) -> str:
    if not changes:
        return f"exact  {what}: changes nothing" + (f" (within {much:.1g} nats)" if much else "")
    return f"note   {what}: changes values" + (f" by up to {much:.2g} nats" if much else "")


def _verdict(is_exact: bool | None) -> str:
    return f"{'exact' if is_exact else 'WRONG':<6}"


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _captum_line(found: Probe) -> str:
    if found.captum_error is None:
        fails = "" if found.found.draws else "fails here: "
        return f"–      captum's own default: {fails}{found.captum_failed}"
    if found.captum_is_right:
        return f"right  captum's own default: within {found.captum_error:.1g} nats of no cache"
    return (
        f"WRONG  captum's own default (use_cached_outputs=True): off by up to "
        f"{found.captum_error:.2g} nats: give use_cached_outputs=False there"
    )
