"""Identity of a model: class, source, revision, and versions of the packages that run it."""

from collections.abc import Iterator
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from captum_llm_ext._compat.model import uncompiled


def versions() -> dict[str, str | None]:
    """Versions of the packages that numbers depend on; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in ("captum-llm-ext", "captum", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def model_source(model: Any) -> tuple[str | None, str | None]:
    """Repository or folder of a transformers model, with its revision.

    Returns:
        Its name (for a local folder the last part), and the revision (commit) of its repository;
        None if unknown.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None, None
    if Path(name).exists():
        return Path(name).resolve().name, None
    # transformers 5.3 kept the commit; 5.23 (2026) does not: only the cache has it.
    revision = getattr(config, "_commit_hash", None) or _only_revision(name)
    return name, revision


def note_revision(model: Any, revision: str) -> None:
    """Records the commit that a model was loaded from, for `model_source`.

    Args:
        model: A model just loaded from a repository; folders are ignored.
        revision: The requested branch, tag or commit.
    """
    from huggingface_hub import try_to_load_from_cache

    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if config is None or not isinstance(name, str) or Path(name).exists():
        return
    # transformers 5.23 (2026) drops the commit; the cache has it in the path of every file.
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    config._commit_hash = Path(found).parent.name if isinstance(found, str) else revision


def _only_revision(name: str) -> str | None:
    """The one commit of a repository that the cache holds; None if there are none or several."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [path.name for path in folder.glob("*")]
    return found[0] if len(found) == 1 else None


def model_description(model: nn.Module) -> str:
    """A model's class, dtype and sizes, without its source."""
    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), None)
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    # How it is stored, loaded or run does not matter.
    moving = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures")
    kept = {k: v for k, v in settings.items() if k not in moving and "distributed" not in k}
    content = repr([(name, kept[name]) for name in sorted(kept)])
    digest = blake2b(content.encode(), digest_size=4).hexdigest()
    # torch 2.13 (2026): fully_shard replaces the model's class by one named FSDPLlama….
    own_classes = (c for c in type(uncompiled(model)).__mro__ if not _is_wrapped(c))
    return f"{next(own_classes).__name__} {dtype} {digest}"


def _is_wrapped(cls: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in cls.__mro__)


def readable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules, each while its weights are on a readable device.

    accelerate 1.x: offloaded weights are on "meta", and its hook loads them for a pass.
    """
    from accelerate.utils import align_module_device

    for name, module in uncompiled(model).named_modules():
        with align_module_device(module):
            yield name.replace("_orig_mod.", ""), module
