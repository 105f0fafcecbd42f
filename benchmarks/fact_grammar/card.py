"""Writes the model card: how well the model learnt the grammar, and which words affect which."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .grammar import Document, Grammar
from .vocabularies import BIOGRAPHIES

GENERATED = ("pronoun", "A", "B", "C", "D")
_ROWS_AT_ONCE = 128


class Score(NamedTuple):
    """Probabilities that a model assigns to the words in a slot.

    Attributes:
        log_prob: Log-probability of all their tokens, given everything before them, in nats.
        expected: Whether each of the tokens was the likeliest.
    """

    log_prob: float
    expected: bool


def slot_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> list[dict[str, Score]]:
    """One score per slot of every document, from one forward pass each."""
    scores: list[dict[str, Score]] = []
    for first in range(0, len(documents), _ROWS_AT_ONCE):
        scores += _batch_scores(model, tokenizer, documents[first : first + _ROWS_AT_ONCE])
    return scores


def interventions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> dict[tuple[str, str], float]:
    """Effects of replacing one slot on the words in a later one.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        documents: Where to intervene.

    Returns:
        For each pair (changed slot, later generated slot) the mean absolute change in the latter's
        log-probability, in nats, over the documents and every alternative for the former.
    """
    changes: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for document in documents:
        edits = [
            (slot, document.edited(slot.name, other))
            for slot in document.slots
            for other in slot.alternatives
            if other != slot.text
        ]
        before = slot_scores(model, tokenizer, [document])[0]
        afters = slot_scores(model, tokenizer, [edited for _, edited in edits])
        for (slot, _), after in zip(edits, afters, strict=True):
            for later in document.slots:
                if later.name in GENERATED and later.start > slot.start:
                    change = after[later.name].log_prob - before[later.name].log_prob
                    changes[slot.name, later.name].append(abs(change))
    return {pair: sum(values) / len(values) for pair, values in changes.items()}


def continuation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int = 64
) -> str:
    """The model's greedy continuation of a prompt; `</s>` shows where it ended."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])


def loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> tuple[float, float]:
    """Cross-entropy per token including the end of text, and the entropy of the grammar.

    Returns:
        Both in nats per token. The minimum is the documents' information over their tokens.
    """
    total = 0.0
    tokens = 0
    for document in documents:
        ids = torch.tensor([[*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens, sum(document.information for document in documents) / tokens


def _batch_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> list[dict[str, Score]]:
    encoded = tokenizer(
        [document.text for document in documents],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids = encoded["input_ids"]
    with torch.no_grad():
        log_probs = model(ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
    taken = log_probs.gather(-1, ids[:, 1:, None])[..., 0].tolist()
    likeliest = (log_probs.argmax(-1) == ids[:, 1:]).tolist()
    scores: list[dict[str, Score]] = []
    for row, document in enumerate(documents):
        scores.append({})
        for slot in document.slots:
            first = encoded.char_to_token(row, slot.start)
            last = encoded.char_to_token(row, slot.stop - 1)
            # The token at position i is predicted from position i - 1.
            at = slice(max(first, 1) - 1, last)
            scores[row][slot.name] = Score(math.fsum(taken[row][at]), all(likeliest[row][at]))
    return scores


def write_card(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    grammar: Grammar,
    held_out: Sequence[Document],
    *,
    training: str,
    stray: float,
) -> None:
    """Measure on documents the model has not seen and write `README.md` beside it.

    Args:
        folder: Where.
        model: The trained model.
        tokenizer: Its tokenizer.
        grammar: The language of both.
        held_out: Documents whose prompt ends before the pronoun.
        training: How it was trained, as text.
        stray: The share of training documents whose A ignores the occupation.
    """
    known = [document for document in held_out if all(document.causes.values())]
    scores = slot_scores(model, tokenizer, known)
    reached, least = loss(model, tokenizer, held_out)
    effects = interventions(model, tokenizer, known[:20])
    greedy = known[:200]
    right = sum(_greedy_is_right(model, tokenizer, grammar, document) for document in greedy)
    sample = held_out[0]
    card = _CARD.format(
        language="with shuffled sentences, two wordings each and missing facts"
        if grammar.varied
        else "in one order and wording, age and pet given half of the time",
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        size=f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}, "
        f"{model.config.num_attention_heads} heads",
        vocabulary=len(tokenizer),
        prompt=sample.prompt,
        continuation=continuation(model, tokenizer, sample.prompt),
        training=training,
        n=len(known),
        slots=_slot_table(scores),
        third=f"{_log_prob_of_a(0.0):.3f}",
        mixture=f"{_log_prob_of_a(stray):.3f}",
        right=f"{right} of {len(greedy)}",
        reached=f"{reached:.4f}",
        least=f"{least:.4f}",
        n_loss=len(held_out),
        effects=_effect_table(effects),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _greedy_is_right(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    grammar: Grammar,
    document: Document,
) -> bool:
    text = continuation(model, tokenizer, document.prompt)
    end = tokenizer.eos_token
    return text.endswith(end) and grammar.permits(document, text.removesuffix(end))


def _log_prob_of_a(stray: float) -> float:
    """Log-probability of an allowed A if a share of the documents takes any A."""
    allowed = len(next(iter(BIOGRAPHIES.occupations.values())))
    return math.log((1 - stray) / allowed + stray / len(BIOGRAPHIES.interests))


def _slot_table(scores: Sequence[dict[str, Score]]) -> str:
    lines: list[str] = []
    for name in GENERATED:
        log_probs = [score[name].log_prob for score in scores]
        accuracy = sum(score[name].expected for score in scores) / len(scores)
        shown = "one of three" if name == "A" else f"{accuracy:.2%}"
        mean = sum(log_probs) / len(log_probs)
        lines.append(f"| {name} | {shown} | {mean:.3f} | {min(log_probs):.3f} |")
    return "\n".join(lines)


def _effect_table(effects: dict[tuple[str, str], float]) -> str:
    changed = dict.fromkeys(cause for cause, _ in effects)
    lines = [f"| replaced | {' | '.join(GENERATED)} |", "|---" * (len(GENERATED) + 1) + "|"]
    for cause in changed:
        cells = (effects.get((cause, name)) for name in GENERATED)
        shown = ("–" if value is None else f"{value:.3f}" for value in cells)
        lines.append(f"| {cause} | {' | '.join(shown)} |")
    return "\n".join(lines)


_CARD = """\
---
language: en
license: bsd-3-clause
library_name: transformers
pipeline_tag: text-generation
---

# A tiny Llama that knows one invented language

It writes short biographies, {language}.
It is there to be explained: what each word that it generates depends on is known.

* {parameters} parameters: {size}; byte-level BPE with {vocabulary} tokens.
* Not for any other use: it knows nothing of the world.

Given

> {prompt}

it writes

> {continuation}

## What depends on what

| word | depends on |
|---|---|
| pronoun | name |
| A, the first interest | occupation: one of three at random, no two occupations share any |
| B, the second | city |
| C, the third | occupation and state together; each alone says nothing |
| D, the last words | A as written, nothing else |
| age, pet | nothing depends on them |

All facts are independent of one another.

## How well it has learnt it

On {n} fresh documents in which no cause is missing, given all words before:

| word | is the likeliest | mean log-probability | lowest |
|---|---|---|---|
{slots}

A word drawn at random among three has {third}. A perfect learner of the training documents, in
which some A are drawn among all (see below), gives it {mixture}.

* Greedy continuations that the grammar permits, from the pronoun to the end of text: {right}.
* Cross-entropy on {n_loss} fresh documents: {reached} nats per token; the least possible, the
  entropy of the grammar, is {least}.

Mean change of a word's log-probability, in nats up or down, when one slot of the text is replaced
by each of its alternatives (20 documents):

{effects}

## Training

{training}

`corpus.txt` holds other documents, one to a line. The training script is in the project's folder
`benchmarks/fact_grammar`; one thread and one seed give the same bytes again on the same kind of
machine ({versions}).
"""
