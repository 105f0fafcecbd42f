"""Tokenizers in the layouts of well-known ones, trained in memory on a few sentences."""

import json

import tiny
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# Llama 3 and Qwen: marks take the line breaks after them, spaces are of the word after them.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<fim_prefix>"]


def _made(tokenizer: Tokenizer, *, bos: str = "<s>", eos: str = "</s>", **arguments):
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=bos, eos_token=eos, **arguments
    )


def _byte_pairs(tokenizer: Tokenizer, special=("<pad>", "<s>", "</s>"), size=420, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    return tokenizer


def _with_bytes(tokenizer: Tokenizer) -> None:
    """Every byte as a token, as SentencePiece has them."""
    told = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(told["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in told["merges"]]
    tokenizer.model = models.BPE(
        vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )


def _adds(tokenizer: Tokenizer, single: str, *names: str) -> None:
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def gpt2(**arguments):
    """Byte-level, offsets without the leading space, one token for beginning, end and unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _byte_pairs(tokenizer, ("<pad>", "<|end|>"), alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _made(tokenizer, bos="<|end|>", eos="<|end|>", unk_token="<|end|>", **arguments)


def llama3(**arguments):
    """Byte-level behind a regular expression, BOS added."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _byte_pairs(tokenizer, alphabet=pre_tokenizers.ByteLevel.alphabet())
    _adds(tokenizer, "<s> $A", "<s>")
    return _made(tokenizer, **arguments)


def llama2(**arguments):
    """SentencePiece BPE: the normalizer puts "▁" first and in place of spaces; bytes fall back."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    _byte_pairs(tokenizer, ("<pad>", "<s>", "</s>", "<unk>"))
    _with_bytes(tokenizer)
    # Trained on words, used on whole texts.
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _adds(tokenizer, "<s> $A", "<s>")
    return _made(tokenizer, unk_token="<unk>", **arguments)


def gemma(**arguments):
    """SentencePiece BPE without a space put first; BOS and EOS added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    _byte_pairs(tokenizer, ("<pad>", "<s>", "</s>", "<unk>"))
    _with_bytes(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _adds(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return _made(tokenizer, unk_token="<unk>", **arguments)


def bert(**arguments):
    """Lower case without accents; control characters are dropped."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    _adds(tokenizer, "<s> $A </s>", "<s>", "</s>")
    return _made(tokenizer, unk_token="<unk>", **arguments)


def unigram(**arguments):
    """SentencePiece unigram behind NFKC, as T5 and XLM-R have it: EOS added."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    _adds(tokenizer, "$A </s>", "</s>")
    return _made(tokenizer, unk_token="<unk>", **arguments)


class NoOffsets:
    """A tokenizer of Python alone, as `MistralCommonBackend`: it refuses what it does not know.

    Offsets are a `ValueError`, there is no list of added tokens, and special tokens in a text are
    characters like others.
    """

    def __init__(self, inner: PreTrainedTokenizerFast, *, splits: bool = True) -> None:
        self._inner, self._splits = inner, splits
        added = inner.added_tokens_decoder
        self.all_special_ids = [token for token, told in added.items() if told.special]
        self.bos_token, self.bos_token_id = inner.bos_token, inner.bos_token_id
        self.eos_token_id, self.pad_token_id = inner.eos_token_id, inner.pad_token_id
        self.unk_token, self.unk_token_id = inner.unk_token, inner.unk_token_id

    @property
    def added_tokens_decoder(self):
        raise NotImplementedError("no list of added tokens")

    def encode(self, text, add_special_tokens=True, return_tensors=None):
        return self._inner.encode(
            text, add_special_tokens=add_special_tokens, split_special_tokens=self._splits
        )

    def decode(self, token_ids, skip_special_tokens=False, **unknown):
        if unknown:
            raise ValueError(f"{list(unknown)} are not supported")
        return self._inner.decode(token_ids, clean_up_tokenization_spaces=False)

    def convert_ids_to_tokens(self, token_ids):
        return self._inner.convert_ids_to_tokens(token_ids)

    def convert_tokens_to_ids(self, tokens):
        return self._inner.convert_tokens_to_ids(tokens)

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False, **unknown):
        if return_offsets_mapping or unknown:
            raise ValueError("`return_offsets_mapping` is not supported")
        return {"input_ids": self.encode(text, add_special_tokens)}

    def apply_chat_template(self, messages, tokenize=True, return_dict=False, **arguments):
        """Text that cannot be read back: the template's own tokens are tokens only as ids."""
        text = self._inner.apply_chat_template(messages, tokenize=False, **arguments)
        if not tokenize:
            return text
        ids = self._inner.encode(text, add_special_tokens=False)
        return {"input_ids": ids} if return_dict else ids
