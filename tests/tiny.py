"""Small models and tokenizers, made in memory."""

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include golf and chess.",
    "Ann lives in Austin, TX and is a nurse! Her interests include tennis, music and cooking.",
    "The quick brown fox jumps over the lazy dog. Dr. No paid 3.5 million.",
    "Wörter mit Umlauten; 東京は日本の首都です。 emoji 🙂👩‍👩‍👧 and more.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def _fast(tokenizer: Tokenizer, *, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def byte_level(*, bos: bool = True, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, bos=bos)


def metaspace(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Like SentencePiece BPE with byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:3], trainer)
    return _fast(tokenizer, bos=bos)


def prepending(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Laid out as Llama-2's: a mark is put before every text, whatever it begins with."""
    tokenizer = metaspace(bos=bos).backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    return _fast(tokenizer, bos=bos)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _fast(tokenizer, bos=True)


class NoOffsets:
    """A tokenizer that knows no offsets, with captum's `TokenizerLike` methods only."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner
        self.all_special_ids = inner.all_special_ids
        self.bos_token_id = inner.bos_token_id
        self.eos_token_id = inner.eos_token_id

    def encode(self, text, add_special_tokens=True, return_tensors=None):
        return self._inner.encode(
            text, add_special_tokens=add_special_tokens, return_tensors=return_tensors
        )

    def decode(self, token_ids):
        return self._inner.decode(token_ids)

    def convert_ids_to_tokens(self, token_ids):
        return self._inner.convert_ids_to_tokens(token_ids)

    def convert_tokens_to_ids(self, tokens):
        return self._inner.convert_tokens_to_ids(tokens)

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        if return_offsets_mapping:
            raise NotImplementedError("no offsets here")
        return self._inner(text, add_special_tokens=add_special_tokens)


def llama(vocab_size: int = 400, seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Random weights of the usual size make a model that answers the same to everything.
        "initializer_range": 0.4,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval()
