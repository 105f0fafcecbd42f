"""A language in which the causes of every word are known, and a model trained on it.

`Grammar` draws documents that say what their generated words depend on; `load` gives the small
Llama that was trained on such documents and ships with the package. `train` makes it anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .grammar import Document, Grammar, Segment, Slot

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = Path(__file__).parents[2] / "captum_llm_ext" / "demo" / "model"

__all__ = ["SHIPPED", "Document", "Grammar", "Segment", "Slot", "corpus", "load"]


def load(folder: Path = SHIPPED) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model, in evaluation mode, and its tokenizer.

    Args:
        folder: What `train` has written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def corpus(folder: Path = SHIPPED) -> list[str]:
    """Documents of the model's language, drawn apart from those it was trained on."""
    return (folder / "corpus.txt").read_text(encoding="utf-8").splitlines()
