"""The tiny model that is shipped with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Any

NAME = "demo"
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"


def folder() -> Path:
    """Folder of the model, its tokenizer, corpus and model card."""
    return Path(str(files("captum_llm_ext.demo") / "model"))


def load_demo() -> tuple[Any, Any, list[str]]:
    """Loads a small language model whose answers have known causes, for examples.

    It generates biographies in a made-up grammar; ``demo/model/README.md`` documents which word
    depends on which. Nothing is downloaded.

    Returns:
        The model (Llama, 0.2 million parameters, in eval mode), its tokenizer, and documents of the
        same grammar for `CorpusBaselines`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder()).eval()
    # The name in results; its folder's name, "model", would say nothing.
    model.config.name_or_path = NAME
    tokenizer = AutoTokenizer.from_pretrained(folder())
    corpus = (folder() / "corpus.txt").read_text(encoding="utf-8").splitlines()
    return model, tokenizer, corpus
