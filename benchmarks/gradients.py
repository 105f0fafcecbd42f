"""Gradient attributions of generated text: cost relative to captum, and precision on known causes.

    python benchmarks/gradients.py [--documents 12] [--runs 3] [--out FILE]
    python benchmarks/gradients.py --model FOLDER [--shape 64 32 2] [--memory]

Three parts. Costs: processor seconds of integrated gradients, here and in captum's
`LLMGradientAttribution` over the same model, layer, baseline and steps, in turn within one process,
with the largest difference of their numbers. Causes: precision at k on the fact grammar (see
`ground_truth`), by what stands for an absent feature. With a checkpoint (`FOLDER`, such as
SmolLM2-135M-Instruct of 30 layers) the rest is kept, and the costs on it are added: of single
tokens as features, of groups of them (forward mode), of the whole answer (one way back); and with
``--memory`` the most memory that either takes, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from captum.attr import (
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTokenInput,
)
from environment import environment
from fact_grammar import SHIPPED, Document, Grammar, corpus, load
from ground_truth import documents, precision
from measured import forget_peak, in_turn, kilobytes, llama, prompt_of, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_llm_ext import CorpusBaselines, GenerationGradientAttribution, TextSegmentInput

Absence = tuple[Any, dict[str, Any]]

METHODS = {
    "integrated gradients": (LayerIntegratedGradients, {}),
    "expected gradients": (LayerGradientShap, {"n_samples": 50}),
    "gradient x activation": (LayerGradientXActivation, {}),
}
# (layers, hidden size, vocabulary, prompt, target, steps)
SHAPES = [
    (4, 256, 2000, 32, 16, 20),
    (4, 256, 2000, 64, 64, 10),
    (4, 256, 32000, 64, 32, 10),
]


def absences(grammar: Grammar, texts: Sequence[str]) -> dict[str, Absence]:
    """Replacements of absent features: the input's baselines, and arguments of `attribute`."""
    same_slot = CorpusBaselines(texts)
    return {
        "zero vector": (None, {}),
        "`<unk>`": ("<unk>", {}),
        "one same-slot text": (same_slot, {"n_draws": 1}),
        "mean of 8 same-slot texts": (same_slot, {}),
        "mean of 8 texts of any slot": (CorpusBaselines(texts, match="any"), {}),
    }


def attribute(
    model: Any,
    tokenizer: Any,
    document: Document,
    absence: Absence,
    method: str = "integrated gradients",
    seed: int = 0,
) -> Any:
    """Attributes the document's own continuation; features are its slots and connecting words."""
    kind, arguments = METHODS[method]
    baselines, more = absence
    output = [
        (s.start - document.cut, s.stop - document.cut) for s in document.segments("continuation")
    ]
    spans = [(s.start, s.stop) for s in document.segments("prompt")]
    inp = TextSegmentInput(document.prompt, tokenizer, spans, baselines=baselines)
    attribution = GenerationGradientAttribution(kind(model, None), tokenizer)
    return attribution.attribute(
        inp, document.continuation, output_unit=output, seed=seed, **arguments, **more
    )


def causes(n: int, seed: int) -> list[dict[str, Any]]:
    """One row per method and absence."""
    model, tokenizer = load(SHIPPED)
    given = documents(n, seed)
    rows: list[dict[str, Any]] = []
    for name, absence in absences(Grammar(), corpus(SHIPPED)).items():
        for method in METHODS:
            baselines, more = absence
            if method == "gradient x activation" and baselines is not None:
                continue  # it knows no other baseline than zero
            if more and method == "expected gradients":
                continue  # each of its samples is a draw of its own
            told = name
            if method == "expected gradients":
                told = name.replace("mean of 8 same-slot texts", "a same-slot text per sample")
                told = told.replace("mean of 8 texts of any slot", "a text of any slot per sample")
            results = [attribute(model, tokenizer, d, absence, method) for d in given]
            both = list(zip(given, results, strict=True))
            rows.append(
                {
                    "method": method,
                    "absence": told,
                    "precision": mean(v for d, r in both for v in precision(d, r).values()),
                    "precision_content_words": mean(
                        v for d, r in both for v in precision(d, r, content_only=True).values()
                    ),
                    "largest_gap": max(float(r.efficiency_gap.abs().max()) for r in results),
                    "points": mean(r.n_evaluations for r in results),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def costs(shape: tuple[int, ...], runs: int) -> dict[str, Any]:
    """Processor seconds here and in captum, and how far apart the numbers are."""
    layers, hidden, vocabulary, n_prompt, n_target, n_steps = shape
    model = llama(layers, hidden, vocabulary)
    tokenizer, ids = texts(n_prompt + n_target)
    inp = prompt_of(tokenizer, ids[:n_prompt])
    target = torch.tensor(ids[n_prompt:])
    embedding = model.get_input_embeddings()
    kept: dict[str, Any] = {}

    def captums() -> None:
        method = LLMGradientAttribution(LayerIntegratedGradients(model, embedding), tokenizer)
        kept["captum"] = method.attribute(inp, target, n_steps=n_steps)

    def ours(name: str, **given: Any) -> Callable[[], None]:
        def run() -> None:
            method = LayerIntegratedGradients(model, embedding)
            attribution = GenerationGradientAttribution(method, tokenizer)
            kept[name] = attribution.attribute(inp, target, n_steps=n_steps, **given)

        return run

    seconds = in_turn(
        {
            "captum (output held fixed)": captums,
            "here, output held fixed": ours("fixed", output_unit=None),
            "here, earlier output too": ours("output"),
        },
        runs,
    )
    middle = {name: median(times) for name, times in seconds.items()}
    apart = (kept["fixed"].token_attr - kept["captum"].token_attr).abs().max()
    return {
        "layers": layers,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "prompt": n_prompt,
        "target": n_target,
        "steps": n_steps,
        "seconds": seconds,
        "captum_over_ours": {
            name: middle["captum (output held fixed)"] / time for name, time in middle.items()
        },
        "largest_difference": float(apart),
        "largest_attribution": float(kept["captum"].token_attr.abs().max()),
        "largest_output_attribution": float(kept["output"].output_attr.abs().max()),
    }


TEXT = (
    "Lake Baikal in Siberia is the deepest lake in the world. It holds about a fifth of the fresh "
    "water of the earth. The lake was first measured in 1837 by a party of surveyors. "
)
GROUPS = (4, 8, 16)
# Where memory is compared: (prompt, target, steps).
MEMORY = (64, 4, 20)


def checkpoint(folder: str, shape: Sequence[int]) -> tuple[Any, Any, Any, torch.Tensor]:
    """A model, its tokenizer, and a prompt and target of given lengths."""
    n_prompt, n_target = shape[:2]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT * (1 + (n_prompt + n_target) // 40))[: n_prompt + n_target]
    inp = TextTokenInput(tokenizer.decode(ids[:n_prompt]), tokenizer, baselines=0)
    if inp.inp_tensor.shape[1] != n_prompt:
        raise RuntimeError("the text does not come back to the same tokens")
    return model, tokenizer, inp, torch.tensor(ids[n_prompt:])


def real_costs(folder: str, shape: Sequence[int], runs: int) -> dict[str, Any]:
    """Processor seconds on a checkpoint, and how far numbers are from captum's."""
    n_prompt, n_target, n_steps = shape
    model, tokenizer, inp, target = checkpoint(folder, shape)
    embedding = model.get_input_embeddings()
    kept: dict[str, Any] = {}

    def captums() -> None:
        method = LLMGradientAttribution(LayerIntegratedGradients(model, embedding), tokenizer)
        kept["captum"] = method.attribute(inp, target, n_steps=n_steps).token_attr

    def here() -> GenerationGradientAttribution:
        return GenerationGradientAttribution(LayerIntegratedGradients(model, embedding), tokenizer)

    def tokens() -> None:
        found = here().attribute(inp, target, n_steps=n_steps, output_unit=None)
        kept["tokens"] = found.token_attr

    def whole() -> None:
        (span,) = here().attribute_spans(inp, target, n_steps=n_steps, output_unit=None)
        kept["whole answer"] = span.values[None]

    ways = {"captum": captums, "tokens": tokens, "whole answer": whole}
    groups = {n: torch.arange(n_prompt) * n // n_prompt for n in GROUPS if 2 * n <= n_target}
    for n, mask in groups.items():

        def grouped(n: int = n, mask: torch.Tensor = mask) -> None:
            found = here().attribute(
                inp, target, n_steps=n_steps, output_unit=None, feature_mask=mask[None]
            )
            first = [int((mask == group).nonzero()[0]) for group in range(n)]
            kept[f"{n} groups"] = found.token_attr[:, first]

        ways[f"{n} groups"] = grouped
    seconds = in_turn(ways, runs)
    middle = {name: median(times) for name, times in seconds.items()}
    wanted = {"tokens": kept["captum"], "whole answer": kept["captum"].sum(0, keepdim=True)}
    for n, mask in groups.items():
        blank = torch.zeros(n_target, n)
        wanted[f"{n} groups"] = blank.index_add(1, mask, kept["captum"])
    return {
        "layers": model.config.num_hidden_layers,
        "vocabulary": model.config.vocab_size,
        "prompt": n_prompt,
        "target": n_target,
        "steps": n_steps,
        "seconds": seconds,
        "captum_over_ours": {name: middle["captum"] / time for name, time in middle.items()},
        "largest_difference": {
            name: float((kept[name] - own).abs().max()) for name, own in wanted.items()
        },
        "largest_attribution": float(kept["captum"].abs().max()),
    }


def memory(folder: str) -> dict[str, Any]:
    """Peak memory of both beyond the model, in MB, each in its own process."""
    found: dict[str, Any] = dict(zip(("prompt", "target", "steps"), MEMORY, strict=True))
    for name in ("captum", "captum, 10 rows a pass", "here"):
        command = [sys.executable, __file__, "--model", folder, "--memory-of", name]
        found[name] = float(subprocess.run(command, capture_output=True, check=True).stdout)
        print(f"  {name:34} {found[name]:8.0f} MB", flush=True)
    return found


def memory_of(name: str, folder: str) -> float:
    """Peak memory of an attribution in this process beyond that of a plain pass, in MB."""
    model, tokenizer, inp, target = checkpoint(folder, MEMORY)
    with torch.no_grad():
        model(input_ids=inp.inp_tensor)
    before = forget_peak()
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    given: dict[str, Any] = {"n_steps": MEMORY[2]}
    if name == "here":
        own = GenerationGradientAttribution(method, tokenizer)
        own.attribute(inp, target, output_unit=None, **given)
    else:
        if "10 rows" in name:
            given["internal_batch_size"] = 10
        LLMGradientAttribution(method, tokenizer).attribute(inp, target, **given)
    return (kilobytes("VmHWM") - before) / 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both parts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    out = Path(__file__).parent / "results" / "gradients.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar="N")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Paths from zero are not smooth; how far off they are is a column of the table.
    warnings.filterwarnings("ignore", ".*steps are too few", UserWarning)
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, arguments.model))
        return
    if arguments.model:
        report = json.loads(arguments.out.read_text(encoding="utf-8"))
        own = report.setdefault("checkpoint", {"costs": [], "memory_mb": {}})
        # Not the folder, which is this machine's.
        own |= {**environment(seed=0), "command": "python benchmarks/gradients.py --model FOLDER"}
        for shape in arguments.shape or []:
            rest = [row for row in own["costs"] if [row["prompt"], row["target"]] != shape[:2]]
            own["costs"] = [*rest, real_costs(arguments.model, shape, arguments.runs)]
        if arguments.memory:
            own["memory_mb"] = memory(arguments.model)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return
    report = {
        **environment(seed=arguments.seed),
        "documents": arguments.documents,
        "causes": causes(arguments.documents, arguments.seed),
        "costs": [costs(shape, arguments.runs) for shape in SHAPES],
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
