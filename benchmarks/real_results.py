"""Results of a real model on realistic prompts, for tests and pictures.

    PYTHONPATH=benchmarks python benchmarks/real_results.py   # writes tests/data/rag.safetensors …
    PYTHONPATH=benchmarks python benchmarks/real_results.py chat     # one of them

They hold numbers and text, no weights. `--model` may name a folder with a checkpoint; `--answers`
shows what the model says and attributes nothing.

The prompts are four kinds that people explain, in float32, one seed. The evaluations are a rule and
not a choice made on these results: 32 for each feature of prompt and answer, twice the default, and
8 for the long summary.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from captum.attr import KernelShap
from real_causes.checkpoints import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import ChatInput, GenerationAttribution, ModelBaselines, TextSegmentInput

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "data"
MODEL = "SmolLM2-135M-Instruct"

LAKES = """\
Lake Superior is the largest of the Great Lakes of North America. It holds ten percent of \
the world's surface fresh water.

The Caspian Sea is bounded by Kazakhstan and Russia. Its surface lies 28 metres below sea \
level.

Lake Titicaca lies in the Andes on the border of Bolivia and Peru. Its surface is 3812 \
metres above sea level.

Lake Baikal in Siberia is the deepest lake in the world. It is 1642 metres deep and holds \
more water than all the Great Lakes.

Question: How deep is Lake Baikal?"""

CHAT = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "My name is Anna and I live in Lisbon with my dog Bruno."},
    {"role": "assistant", "content": "Nice to meet you, Anna!"},
    {"role": "user", "content": "I want to take a walk. What is the name of my dog?"},
]

REVIEWS = """Review: The room was clean and the staff were friendly.
Sentiment: positive

Review: We waited for an hour and the soup was cold.
Sentiment: negative

Review: A lovely garden, and breakfast was the best in town.
Sentiment: positive

Review: The waiter was rude and the bill was wrong.
Sentiment:"""

REPORT = """Summarize the following report in two sentences.

The town council of Ashford met on Tuesday to discuss the future of the old paper mill. The \
mill has stood empty since 2009, when its last owner went bankrupt. Three plans were \
presented.

The first plan, by the architect Maria Lindqvist, turns the mill into forty flats and a \
library. It would cost nine million pounds and take three years. Residents praised the \
library but feared that the flats would be too expensive for local families.

The second plan would tear the building down and make a car park. It is the cheapest, at \
half a million pounds. The heritage society said that it would fight any demolition in \
court.

The third plan came from a group of students. They want to run workshops for carpenters, \
bakers and bicycle mechanics in the old halls. The council asked them to show how they would \
pay for heating.

The mayor, Tom Okafor, said that no decision would be made before the spring. A public vote \
will be held on the fourth of March."""


def prompts(tokenizer: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name the input, and the arguments of attribution and of `attribute`."""
    units = ("paragraph", "sentence", "word")
    ask = [{"role": "user", "content": LAKES}]
    tell = [{"role": "user", "content": REPORT}]
    return {
        "rag": (
            ChatInput(ask, tokenizer, units[:2], baselines="delete"),
            {"gen_args": {"max_new_tokens": 28}, "n_samples": 32 * 28, "output_unit": "word"},
        ),
        "chat": (
            ChatInput(CHAT, tokenizer, ("turn", "word"), baselines="delete"),
            {"gen_args": {"max_new_tokens": 6}, "n_samples": 32 * 38},
        ),
        "few_shot": (
            TextSegmentInput(REVIEWS, tokenizer, units[::2], baselines=ModelBaselines()),
            {"gen_args": {"max_new_tokens": 1}, "n_samples": 32 * 50},
        ),
        "summary": (
            ChatInput(tell, tokenizer, units[:2], baselines="delete"),
            {"gen_args": {"max_new_tokens": 64}, "n_samples": 8 * 79},
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="which; by default all")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--checkpoints", type=Path, help="a folder: a killed run goes on")
    arguments = parser.parse_args()
    if arguments.checkpoints:
        arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    where = folder(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=getattr(torch, arguments.dtype)
    ).eval()
    model.config._name_or_path = MODEL  # what the cached folder is called says less
    for name, (inp, how) in prompts(tokenizer).items():
        if arguments.names and name not in arguments.names:
            continue
        if arguments.answers:
            ids = torch.tensor([inp.to_model_input().tolist()[0]])
            out = model.generate(ids, do_sample=False, **how["gen_args"])
            print(name, repr(tokenizer.decode(out[0, ids.shape[1] :])), flush=True)
            continue
        value = "contrast" if name == "few_shot" else "log_prob"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deletion is what people use, whatever it tells
            attribution = GenerationAttribution(KernelShap(model), tokenizer, value)
            kept = arguments.checkpoints and arguments.checkpoints / f"{name}.safetensors"
            result = attribution.attribute(inp, seed=0, checkpoint=kept, **how)
        result.provenance["command"] = f"real_results.py {name}"
        result.save(arguments.out / f"{name}.safetensors")
        print(result, flush=True)


if __name__ == "__main__":
    main()
