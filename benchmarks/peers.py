"""Cost of attribution beside other packages, each used as its documentation describes."""

import importlib.util
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
from captum.attr import FeatureAblation
from measured import in_turn, llama, prompt_of, texts
from transformers import GPT2Config, GPT2LMHeadModel

from captum_llm_ext import GenerationAttribution, PartitionShap

# Layers and width: from a model that is all head to one whose layers weigh as much.
SHAP_MODELS = ((2, 64), (4, 256))


def beside_shap(runs: int) -> dict[str, Any] | None:
    """shap's PartitionExplainer and `PartitionShap`: 500 evaluations, 32 prompt tokens, 16 targets.

    Once with shap's own model of generated text, as ``shap.Explainer(model, tokenizer)`` makes it,
    and once with the least that such a model can do: one plain forward for each masked text, and a
    softmax of the logits that predict the target. What no exact way can do without is measured
    beside: the product that makes the logits of 16 tokens for as many rows as were distinct.
    """
    if not importlib.util.find_spec("shap"):
        return None
    models = [_beside_shap(layers, hidden, runs) for layers, hidden in SHAP_MODELS]
    return {"shap": version("shap"), "P": 32, "T": 16, "evaluations": 500, "models": models}


def _beside_shap(layers: int, hidden: int, runs: int) -> dict[str, Any]:
    import shap

    n_words = 50000
    model = llama(layers, hidden, n_words)
    tokenizer, ids = texts(48)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text, target = tokenizer.decode(ids[1:32]), ids[32:]
    inp = prompt_of(tokenizer, ids[:32])
    ours = GenerationAttribution(PartitionShap(model), tokenizer)
    answer = np.array([tokenizer.decode(target)])

    @torch.no_grad()
    def log_probs(prompts: Any) -> Any:
        rows = []
        for prompt in prompts:
            head = tokenizer.encode(str(prompt))
            logits = model(input_ids=torch.tensor([head + target[:-1]])).logits[0]
            said = logits[len(head) - 1 :].log_softmax(-1)
            rows.append(said.gather(1, torch.tensor(target)[:, None])[:, 0])
        return torch.stack(rows).numpy()

    least = shap.PartitionExplainer(log_probs, shap.maskers.Text(tokenizer))
    # What `shap.Explainer` makes, but for the answer: it is given, not generated.
    masker = shap.maskers.Text(tokenizer, mask_token="...", collapse_mask_token=True)
    forced = shap.models.TeacherForcing(model, tokenizer)
    own = shap.PartitionExplainer(forced, shap.maskers.OutputComposite(masker, lambda _: answer))

    def here() -> Any:
        return ours.attribute(inp, torch.tensor(target), output_unit=None, n_samples=500)

    n_rows = here().n_evaluations
    states, weight = torch.randn(n_rows * 16, hidden), model.lm_head.weight.detach()
    memory = torch.empty(1024, n_words)

    def head() -> None:
        for some in states.split(1024):
            torch.mm(some, weight.t(), out=memory[: len(some)])

    times = in_turn(
        {
            "ours, 500 evaluations": here,
            "shap, 500 evaluations": lambda: own([text], max_evals=500, silent=True),
            "shap, plain forwards, 500 evaluations": lambda: least(
                [text], max_evals=500, silent=True
            ),
            "the logits' product alone": head,
        },
        runs,
    )
    middle = {name: median(took) for name, took in times.items()}
    took = middle["ours, 500 evaluations"]
    return {
        "model": f"Llama, {layers} layers, d={hidden}, V={n_words:,}",
        "rows": n_rows,
        "seconds": times,
        "ratio": middle["shap, 500 evaluations"] / took,
        "ratio_plain_forwards": middle["shap, plain forwards, 500 evaluations"] / took,
        "share_of_the_logits_product": middle["the logits' product alone"] / took,
    }


def beside_inseq(runs: int) -> dict[str, Any] | None:
    """inseq's occlusion, which has earlier output as features: 32 prompt tokens, 16 targets."""
    if not importlib.util.find_spec("inseq"):
        return None
    import inseq

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tokenizer, ids = texts(48)
    text, whole = tokenizer.decode(ids[1:32]), tokenizer.decode(ids[1:])
    inp, target = prompt_of(tokenizer, ids[:32]), torch.tensor(ids[32:])
    theirs: Any = inseq.load_model(model, "occlusion", tokenizer=tokenizer)
    ours = GenerationAttribution(FeatureAblation(model), tokenizer)
    times = in_turn(
        {
            "ours, prompt and output": lambda: ours.attribute(inp, target),
            "inseq, occlusion": lambda: theirs.attribute(
                text, whole, show_progress=False, pretty_progress=False
            ),
        },
        runs,
    )
    middle = {name: median(took) for name, took in times.items()}
    return {
        "model": "GPT-2, 12 layers, d=768, V=50,257",
        "sizes": {"P": 32, "T": 16},
        "inseq": version("inseq"),
        "seconds": times,
        "ratio": middle["inseq, occlusion"] / middle["ours, prompt and output"],
    }
