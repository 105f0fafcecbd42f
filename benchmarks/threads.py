"""Attributions of one model in several threads, beside other uses: differences from sequential
runs.

Every thread's results are held against those of the same calls one after another. Forwards and
generated texts of the threads that merely use the model must be the same to the last bit.

    python benchmarks/threads.py --out benchmarks/results/threads.json
"""

import argparse
import itertools
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    ShapleyValueSampling,
    TextTokenInput,
)
from environment import environment
from fact_grammar import load
from transformers import AutoConfig, AutoModelForCausalLM

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    GenerationGradientAttribution,
    TextSegmentInput,
)
from captum_llm_ext.model import Scorer, TokenRow

# Between bytecodes of one thread others come often: what can happen does.
SWITCH_INTERVAL = 1e-5
TOLERANCE = 1e-5
PROMPT = "Dave lives in Palm Coast, FL and is a lawyer."
ANSWER = " He likes golf and chess."
TEXTS = [
    "Ann lives in Austin, TX and is a nurse.",
    "Bob lives in Salt Lake City, UT and is a judge.",
    "Eve lives in Boston, MA and is a lawyer.",
    "Carol lives in Palm Coast, FL and is a teacher.",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES | GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "mistral": SIZES | GROUPED | {"sliding_window": 8},
    "gemma3_text": SIZES | GROUPED | {"head_dim": 8, "sliding_window": 8},
}
Call = Callable[[], torch.Tensor]


def model_of(name: str, vocab_size: int) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"vocab_size": vocab_size, "initializer_range": 0.3} | MODELS[name] | special
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()


def attributions(
    model: Any, tokenizer: Any, prompt: str = PROMPT, answer: str = ANSWER
) -> dict[str, Call]:
    """The attributions, and the kinds of reuse."""
    inp = TextSegmentInput(prompt, tokenizer, "word", baselines="delete")
    target = tokenizer.encode(answer, add_special_tokens=False)

    def by(method: Any, inp: Any = inp, **options: Any) -> Call:
        kind = GenerationAttribution
        if isinstance(method, LayerGradientXActivation | LayerGradientShap):
            kind = GenerationGradientAttribution
        attribution = kind(method, tokenizer)
        return lambda: attribution.attribute(inp, target, **options).full_attr

    def written() -> torch.Tensor:
        attribution = GenerationAttribution(FeatureAblation(model), tokenizer)
        arguments = {"max_new_tokens": 6, "do_sample": True}
        return attribution.attribute(inp, gen_args=arguments, seed=3).full_attr

    prompts = [inp.ids[:i] + inp.ids[i + 1 :] for i in range(1, len(inp.ids))]
    rows = [
        TokenRow((*ids, *target[:-1]), range(len(ids) - 1, len(ids) - 1 + len(target)))
        for ids in prompts
    ]

    def scored(reuse: Any) -> Call:
        return lambda: Scorer(model, reuse=reuse, overhead=0).values(rows, torch.tensor(target))

    layer = model.get_input_embeddings()
    # Its candidates are weighed by the model itself.
    corpus = CorpusBaselines(TEXTS, match="model", min_candidates=0, seed=0)
    likely = TextSegmentInput(prompt, tokenizer, "word", baselines=corpus)
    return {
        "leave-one-out": by(FeatureAblation(model)),
        "Shapley": by(ShapleyValueSampling(model), n_samples=4),
        "baselines that ask the model": by(FeatureAblation(model), likely, n_draws=2),
        "gradient x activation": by(
            LayerGradientXActivation(model, layer), TextTokenInput(prompt, tokenizer)
        ),
        "expected gradients": by(
            LayerGradientShap(model, None), TextTokenInput(prompt, tokenizer), n_samples=3
        ),
        "sampled text": written,
        "packed rows": scored("pack"),
        "shared states": scored("share"),
        "copied states": scored("copy"),
        "whole rows": scored("off"),
    }


def uses(model: Any, tokenizer: Any) -> dict[str, Call]:
    """Uses of the model by other threads at the same time."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    batch = torch.cat([ids, ids.roll(3, 1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0

    def forward(**arguments: Any) -> Call:
        @torch.no_grad()
        def call() -> torch.Tensor:
            return model(**arguments).logits

        return call

    def trained() -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward(inputs=[embedded])
        return embedded.grad

    def generated(**arguments: Any) -> Call:
        return lambda: model.generate(ids, max_new_tokens=6, do_sample=False, **arguments)

    return {
        "forward": forward(input_ids=ids),
        "forward of a padded batch": forward(input_ids=batch, attention_mask=mask),
        "forward with a gradient": trained,
        "generate": generated(attention_mask=torch.ones_like(ids)),
        "generate with beams": generated(attention_mask=torch.ones_like(ids), num_beams=2),
    }


def in_threads(
    own: dict[str, Call], others: dict[str, Call], n_own: int, n_others: int, n_threads: int
) -> dict[str, Any]:
    """Counts of outcomes, with attributions in half of the threads and other uses in the rest.

    Args:
        own: Attributions.
        others: Uses.
        n_own: So many of the former in all.
        n_others: So many of the latter at least, and as long as there are attributions.
        n_threads: Of each kind.
    """
    expected = {name: call() for name, call in (own | others).items()}
    counts: Counter[str] = Counter()
    failures: list[str] = []
    lock, ends = threading.Lock(), threading.Event()
    tickets, uses_begun = itertools.count(), itertools.count()
    start = threading.Barrier(2 * n_threads)

    def note(kind: str, name: str, call: Call) -> None:
        try:
            found = call()
            same = torch.equal(found, expected[name])
            near = same or (
                found.shape == expected[name].shape
                and torch.allclose(found, expected[name], rtol=0, atol=TOLERANCE, equal_nan=True)
            )
            told = "equal" if same else "within tolerance" if near else "different"
            failure = None if near else f"{name}: different"
        except Exception as error:
            told, failure = "raised", f"{name}: {type(error).__name__}: {error}"[:200]
        with lock:
            counts[f"{kind}: {told}"] += 1
            if failure is not None and len(failures) < 20:
                failures.append(failure)

    def attribute() -> None:
        start.wait()
        names = list(own)
        while (number := next(tickets)) < n_own:
            note("attributions", names[number % len(names)], own[names[number % len(names)]])

    def use() -> None:
        start.wait()
        names = list(others)
        while (number := next(uses_begun)) < n_others or not ends.is_set():
            note("uses", names[number % len(names)], others[names[number % len(names)]])

    attributing = [threading.Thread(target=attribute) for _ in range(n_threads)]
    using = [threading.Thread(target=use) for _ in range(n_threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        for thread in attributing + using:
            thread.start()
        for thread in attributing:
            thread.join()
        ends.set()
        for thread in using:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return {"counts": dict(sorted(counts.items())), "failures": failures}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attributions", type=int, default=200)
    parser.add_argument("--uses", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    _, tokenizer = load()
    report: dict[str, Any] = {
        "environment": environment(seed=0),
        "switch_interval": SWITCH_INTERVAL,
    }
    for name in given.models:
        model = model_of(name, len(tokenizer))
        own, others = attributions(model, tokenizer), uses(model, tokenizer)
        report[name] = in_threads(own, others, given.attributions, given.uses, given.threads)
        print(name, json.dumps(report[name], indent=1), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
