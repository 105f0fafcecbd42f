"""--quantize: quantization of a model's weights on loading."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

from captum_llm_ext.cli.command import UsageError

HELP = (
    "load the weights in 8bit or 4bit (bitsandbytes), as torchao:CLASS says, such as "
    "torchao:Int8WeightOnlyConfig, or as a quantization configuration of transformers: JSON such "
    'as {"quant_method": "quanto", "weights": "int8"}'
)
_BITS: Mapping[str, Mapping[str, Any]] = {
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}
_TORCHAO = "torchao:"
_GIVE = f"give {', '.join(_BITS)}, {_TORCHAO}CLASS or a JSON object"
# transformers 5.23: modules of configurations, and required packages.
_NEEDS: Mapping[str, tuple[str, str]] = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "hqq": ("hqq", "hqq"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "auto-round": ("auto_round", "auto-round"),
    "eetq": ("kernels", "kernels"),
}


def quantization(given: str | None) -> Any:
    """The configuration for ``--quantize``; None without it.

    Raises:
        UsageError: If transformers has no such configuration.
        ValueError: If a required package is missing.
    """
    if given is None:
        return None
    config = _as_config(given)
    method = str(config.get("quant_method", ""))
    if method in _NEEDS:
        module, package = _NEEDS[method]
        if not _is_there(module):
            raise ValueError(f"--quantize {given} needs another package: pip install {package}")
    try:
        if given.startswith(_TORCHAO):
            return _of_torchao(given.removeprefix(_TORCHAO))
        from transformers.quantizers.auto import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict(dict(config))
    except ImportError as error:
        raise ValueError(f"--quantize {given} needs another package: {error}") from error
    except Exception as error:  # configurations may raise anything for invalid arguments
        raise UsageError(f"--quantize {given}: {error}") from error


def _as_config(given: str) -> Mapping[str, Any]:
    if given.startswith(_TORCHAO):
        return {"quant_method": "torchao"}
    if given in _BITS:
        return _BITS[given]
    try:
        config: Any = json.loads(given)
    except json.JSONDecodeError as error:
        raise UsageError(f"--quantize {given}: {_GIVE} ({error}).") from error
    if not isinstance(config, Mapping):
        raise UsageError(f"--quantize {given}: {_GIVE}.")
    return cast(Mapping[str, Any], config)


def _of_torchao(name: str) -> Any:
    """A torchao configuration by class name, with its defaults."""
    import torchao.quantization as known  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    names = sorted(own for own in dir(known) if own.endswith("Config"))
    if name not in names:
        raise ValueError(f"torchao has no {name or 'such class'}: give one of {', '.join(names)}")
    return TorchAoConfig(getattr(known, name)())


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False
