"""Evaluations saved by `stop="top3"`, and accuracy of the sets it accepts.

On games with known Shapley values: evaluations per feature where the rule stops (at most what a
run without it takes, 16), how often a set that it let pass misses a feature by more than the
tolerance, and how often it is the true set, beside what 16 a feature give. On answers of the demo
and, with ``--model``, of a checkpoint: evaluations of the answer's and of every token's strongest
causes beside those of a fixed run, and how many of the fixed run's sets they agree with.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import games
import torch
from captum.attr import KernelShap
from environment import ROOT, environment
from torch import Tensor

from captum_llm_ext import (
    CorpusBaselines,
    GenerationAttribution,
    ModelBaselines,
    TextSegmentInput,
    TopCauses,
    load_demo,
)
from captum_llm_ext.coalitions import (
    Scope,
    Solution,
    join_plans,
    plan_anchors,
    plan_pairs,
    solve_kernel,
)

WITHIN = (0.05, 0.1, 0.2)
RULES = {
    "top1": TopCauses(1),
    "top3": TopCauses(3),
    "answer top1": TopCauses(1, "answer"),
    **{f"answer top3 within {within}": TopCauses(3, "answer", within) for within in WITHIN},
}
N_FEATURES, N_SEEDS, MOST, GROWTH = 30, 12, 16, 0.25
PROMPTS = (
    "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include",
    "Mary lives in Dover, DE and is a nurse. Her personal interests include",
    "Raj lives in Reno, NV and is a chef. His personal interests include",
)


def solutions(game: games.Game, n: int, seed: int) -> Iterator[tuple[int, Solution]]:
    """The solution after each round, with the coalitions so far."""
    generator = torch.Generator().manual_seed(seed)
    plan = join_plans([plan_anchors(n), plan_pairs(n, 2 * n, generator=generator)])
    while True:
        values = game.worth(plan.masks)[:, None].float()
        yield len(plan.masks), solve_kernel(plan, values, Scope.of_all(1, n))
        size = min(max(2, round(GROWTH * len(plan.masks))), MOST * n - len(plan.masks))
        if size < 2:
            return
        plan = join_plans([plan, plan_pairs(n, size // 2 * 2, generator=generator)])


def lost(truth: Tensor, found: Tensor, k: int) -> float:
    """Excess of the strongest omitted feature over the weakest in the set, relative to the
    range."""
    sizes = truth.abs()
    chosen = found.abs().argsort(descending=True)[:k]
    kth = sizes.sort(descending=True).values[k - 1]
    return float((kth - sizes[chosen].min()) / (truth.max() - truth.min()))


def on_games(kinds: dict[str, Any], k: int, within: float = 0.05) -> dict[str, Any]:
    """Means over games and seeds."""
    rule, rows = TopCauses(k, within=within), []
    for make in kinds.values():
        for seed in range(N_SEEDS):
            game = make(N_FEATURES, torch.Generator().manual_seed(seed))
            stopped = None
            for n_rows, solution in solutions(game, N_FEATURES, 1000 + seed):
                miss = lost(game.truth, solution.attributions[0], k)
                if stopped is None and float(rule.excess(solution)) <= 1:
                    stopped = (n_rows, miss)
            rows.append((stopped, n_rows, miss))
    passed = [stopped for stopped, _, _ in rows if stopped]
    at_stop = [stopped or (n_rows, miss) for stopped, n_rows, miss in rows]
    return {
        "n_games": len(rows),
        "k": k,
        "within": within,
        "stopped": len(passed) / len(rows),
        "evaluations_per_feature": sum(n for n, _ in at_stop) / len(rows) / N_FEATURES,
        "fixed_per_feature": sum(n for _, n, _ in rows) / len(rows) / N_FEATURES,
        "passed_and_wrong": sum(m > rule.within for _, m in passed) / max(len(passed), 1),
        "true_set": sum(m <= 0 for _, m in at_stop) / len(rows),
        "true_set_fixed": sum(m <= 0 for _, _, m in rows) / len(rows),
    }


def on_text(model: Any, tokenizer: Any, prompts: Any, baselines: Any, n_new: int) -> dict[str, Any]:
    """Evaluations of answers, fixed and with rules."""
    attribution = GenerationAttribution(KernelShap(model), tokenizer)
    rows: dict[str, list[Any]] = {rule: [] for rule in RULES}
    for prompt in prompts:
        inp = TextSegmentInput(prompt, tokenizer, "word", baselines=baselines)
        fixed = attribution.attribute(inp, gen_args={"max_new_tokens": n_new})
        for rule, stop in RULES.items():
            found = attribution.attribute(inp, fixed.target, stop=stop)
            k, whole = stop.k, stop.of == "answer"
            pairs = (
                [(fixed.full_attr.sum(0), found.full_attr.sum(0))]
                if whole
                else [*zip(fixed.full_attr, found.full_attr, strict=True)]
            )
            weights = [float(a.max() - a.min()) for a, _ in pairs]
            worth = [pair for pair, w in zip(pairs, weights, strict=True) if w > max(weights) / 20]
            close = sum(lost(a, b, k) <= 0.05 for a, b in worth) / len(worth)
            settled = sum(found.settled) / len(found.settled)
            ratio = fixed.n_evaluations / found.n_evaluations
            rows[rule].append((ratio, settled, close))
            print(
                repr(prompt[:30]), rule, f"{ratio:.2f}x, settled {settled:.2f}, agree {close:.2f}"
            )
    names = ("fewer_evaluations", "settled", "agrees_with_fixed")
    return {
        rule: {name: sum(row[i] for row in found) / len(found) for i, name in enumerate(names)}
        for rule, found in rows.items()
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder, beside the demo")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name, kinds in {"developed on": games.DEVELOPED_ON, "held out": games.HELD_OUT}.items():
        found[name] = [on_games(kinds, 1), *(on_games(kinds, 3, within) for within in WITHIN)]
        print(name, *found[name], sep="\n")
    model, tokenizer, texts = load_demo()
    found["demo"] = on_text(model, tokenizer, PROMPTS, CorpusBaselines(texts), 40)
    if arguments.model:
        from real_causes.measured import PROMPTS as REAL
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        prompts = REAL[::30]
        found["checkpoint"] = on_text(model, tokenizer, prompts, ModelBaselines(), 6)
    path = ROOT / "benchmarks" / "results" / "stopping.json"
    content = {"environment": environment(seed=0), **found}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
