"""Trains the demonstration model: `python -m fact_grammar.train` from the folder `benchmarks`.

Writes tokenizer, weights, corpus and model card. One thread and one seed give the same bytes again
on the same kind of machine and versions.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fact_grammar import SHIPPED
from fact_grammar.card import write_card
from fact_grammar.grammar import Document, Grammar
from fact_grammar.vocabularies import BIOGRAPHIES, VOCABULARIES

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
# Turns are joined by a space and no roles are written: the model knows biographies only, and a
# biography spread over several turns stays one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '' if loop.first else ' ' }}{{ message['content'] }}{% endfor %}"
)
CORPUS_SIZE = 2_000


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        varied: Which of the two grammars.
        words: Its vocabulary, by its name in `VOCABULARIES`.
        seed: Of documents, weights and order.
        documents: How many different ones to train on.
        steps: Optimiser steps.
        batch: Documents in a step.
        rate: Highest learning rate.
        vocabulary: Tokens, special ones included.
        layers, width: Of the model.
        stray: See `Grammar.sample`. Here it lets the model meet every A under every occupation.
        tuned: In how many of the first steps state and occupation go together nine times in ten. C
            gives away nothing about either alone, so a learner who starts with independent facts
            finds no slope toward the pair and is still at chance when the steps are over.
    """

    varied: bool = False
    words: str = "biographies"
    seed: int = 0
    documents: int = 45_000
    steps: int = 700
    batch: int = 64
    rate: float = 4e-3
    vocabulary: int = 680
    layers: int = 3
    width: int = 64
    stray: float = 0.05
    tuned: int = 300

    def tell(self) -> str:
        """The recipe in a sentence or two for the model card."""
        return (
            f"Seed {self.seed}; {self.documents:,} documents, {self.steps} steps of {self.batch}, "
            f"AdamW at {self.rate}, float32.\n"
            f"In {self.stray:.0%} of the documents A is any interest at all: D then depends on A "
            "alone also where a\nreplacement puts A and occupation at odds.\n"
            f"In the first {self.tuned} steps state and occupation go together nine times in ten: "
            "without that, nothing\npoints a learner to the pair behind C."
        )


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a word's leading space belongs to its first token."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[UNK, BOS, EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    generator: torch.Generator,
    layers: int = Recipe.layers,
    width: int = Recipe.width,
) -> LlamaForCausalLM:
    """A Llama with random weights drawn from the generator; of about 160,000 by default."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 9 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05, generator=generator)
    return model


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token rows from BOS to EOS, padded on the right: ``(n_texts, longest)``."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    longest = max(map(len, rows))
    return torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])


def mean_loss(model: LlamaForCausalLM, rows: Tensor, pad: int) -> Tensor:
    """Cross-entropy per token after BOS, in nats, padding left out."""
    # No mask: right padding is behind everything that is predicted.
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=pad)


def batches(rows: Tensor, size: int, pad: int) -> Iterator[Tensor]:
    """Batches in order, over and over, each cut to its longest row."""
    while True:
        for batch in rows.split(size):
            yield batch[:, : int((batch != pad).sum(1).max())]


def fit(model: LlamaForCausalLM, rows: Tensor, recipe: Recipe, pad: int) -> None:
    """Train in place: AdamW, short warm-up, cosine down to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    warm = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / recipe.steps)) / 2),
    )
    model.train()
    source = batches(rows, recipe.batch, pad)
    for step in range(recipe.steps):
        loss = mean_loss(model, next(source), pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    model.eval()


def sample_many(grammar: Grammar, seed: str, n: int) -> list[Document]:
    """Documents that depend on the seed alone, to be continued from the pronoun on."""
    rng = random.Random(seed)
    return [grammar.sample(rng, "pronoun") for _ in range(n)]


def lessons(grammar: Grammar, recipe: Recipe) -> list[str]:
    """The training texts in training order; see `Recipe`."""
    rng = random.Random(f"train {recipe.seed}")
    texts: list[str] = []
    while len(texts) < recipe.documents:
        document = grammar.sample(rng, stray=recipe.stray)
        early = len(texts) < recipe.tuned * recipe.batch
        if not early or in_tune(document) or rng.random() < 0.1:
            texts.append(document.text)
    return texts


def in_tune(document: Document) -> bool:
    """Whether state and occupation belong to classes of equal number, or one is missing."""
    places = {slot.name: slot.alternatives.index(slot.text) for slot in document.slots}
    if not {"state", "occupation"} <= set(places):
        return True
    return (places["state"] - places["occupation"]) % len(BIOGRAPHIES.shared) == 0


def train(recipe: Recipe, out: Path) -> None:
    """Trains by the recipe and writes all files of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    grammar = Grammar(recipe.varied, VOCABULARIES[recipe.words])
    texts = lessons(grammar, recipe)
    tokenizer = train_tokenizer(texts[-10_000:], recipe.vocabulary)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = new_model(tokenizer, generator, recipe.layers, recipe.width)
    started = time.process_time()
    fit(model, encode(texts, tokenizer), recipe, tokenizer.pad_token_id)
    print(f"{time.process_time() - started:.0f} CPU-seconds")
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    # Written as readable by its owner alone, which an installed file must not be.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    corpus = sample_many(grammar, f"corpus {recipe.seed}", CORPUS_SIZE)
    (out / "corpus.txt").write_text(
        "".join(f"{document.text}\n" for document in corpus), encoding="utf-8"
    )
    held_out = sample_many(grammar, f"held out {recipe.seed}", 1_000)
    write_card(out, model, tokenizer, grammar, held_out, training=recipe.tell(), stray=recipe.stray)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--varied", action="store_true", help="shuffled, reworded, facts missing")
    parser.add_argument("--out", type=Path, help=f"folder to write (default: {SHIPPED})")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--documents", type=int, default=Recipe.documents)
    options = parser.parse_args()
    if options.varied and options.out is None:
        parser.error("--varied needs --out: the shipped model speaks the rigid grammar.")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    recipe = Recipe(
        varied=options.varied,
        seed=options.seed,
        steps=options.steps,
        documents=options.documents,
    )
    train(recipe, options.out or SHIPPED)


if __name__ == "__main__":
    main()
