"""The interfaces of two inference engines as they answered in 2026, and a real (tiny) model behind.

What vLLM 0.32 does was seen on a real one (`benchmarks/engines.py`); what SGLang does was taken
from its sources and tests. Both reuse beginnings of prompts in blocks, as their defaults are.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

BLOCK = 4
GARBAGE = -77.0  # where vLLM has not computed a place, whatever memory held


class _Model:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: set[tuple[int, ...]] = set()
        self.told: dict[tuple[int, ...], torch.Tensor] = {}
        self.n_computed = self.n_calls = self.n_prompts = 0

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        key = tuple(ids)
        if key not in self.told:
            self.told[key] = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return self.told[key]

    def cached(self, ids: list[int], most: int) -> int:
        """How many tokens' states are reused, in blocks; keeps those of this prompt."""
        n = 0
        while n + BLOCK <= most and tuple(ids[: n + BLOCK]) in self.blocks:
            n += BLOCK
        self.blocks |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}
        self.n_computed += len(ids) - n
        self.n_prompts += 1
        return n

    def written(self, ids: list[int], n: int, temperature: float) -> list[tuple[int, Any]]:
        found = []
        for _ in range(n):
            told = self.log_probs(ids)[-1]
            hot = torch.softmax(told / max(temperature, 1e-6), -1)
            token = int(hot.multinomial(1) if temperature else told.argmax())
            found.append((token, told))
            ids = [*ids, token]
        return found


def _top(told: torch.Tensor, token: int, k: int) -> dict[int, float]:
    best = told.topk(k) if k else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return {token: float(told[token]), **dict(pairs)}


@dataclass
class SamplingParams:
    """Those of vLLM's that are asked for."""

    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_reading_prefix_cache: bool | None = None
    detokenize: bool = True


@dataclass
class LLM:
    """vLLM's ``LLM``: places that were not computed have no log-probabilities of their own."""

    model: Any
    recorded: _Model = field(init=False)

    def __post_init__(self) -> None:
        self.recorded = _Model(self.model)
        config = SimpleNamespace(model="tiny", max_model_len=512)
        self.llm_engine = SimpleNamespace(model_config=config)

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7)

    def generate(self, prompts: Any, how: SamplingParams, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.recorded.n_calls += 1
        return [self._answer(prompt["prompt_token_ids"], how) for prompt in prompts]

    def _answer(self, ids: list[int], how: SamplingParams) -> Any:
        skips = how.skip_reading_prefix_cache
        skips = how.prompt_logprobs is not None if skips is None else skips
        n = 0 if skips else self.recorded.cached(ids, len(ids) - 1)
        told = self.recorded.log_probs(ids)
        entries: list[Any] = [None]
        for i in range(1, len(ids)):
            own = _top(told[i - 1], ids[i], how.prompt_logprobs or 0)
            if i <= n:
                own = {-(2**62): GARBAGE}
                if how.detokenize and how.prompt_logprobs is not None:
                    raise OverflowError("number too small to fit in target type")
            entries.append({k: SimpleNamespace(logprob=v) for k, v in own.items()})
        outputs = []
        for _ in range(how.n):
            wrote = self.recorded.written(ids, how.max_tokens, how.temperature)
            tops = [_top(at, token, how.logprobs or 0) for token, at in wrote]
            outputs.append(
                SimpleNamespace(
                    token_ids=[token for token, _ in wrote],
                    logprobs=[
                        {k: SimpleNamespace(logprob=v) for k, v in top.items()} for top in tops
                    ],
                    finish_reason="length",
                )
            )
        return SimpleNamespace(prompt_logprobs=entries, num_cached_tokens=n, outputs=outputs)


@dataclass
class Engine:
    """SGLang's ``Engine``: nothing is reused from where log-probabilities begin."""

    model: Any
    recorded: _Model = field(init=False)

    def __post_init__(self) -> None:
        self.recorded = _Model(self.model)
        # What it reads from the model's configuration, with ``context_length`` left to it.
        self.tokenizer_manager = SimpleNamespace(context_len=512)
        self.server_args = SimpleNamespace(model_path="tiny", context_length=None)

    def generate(
        self,
        prompt: None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        return_logprob: bool = False,
        logprob_start_len: Any = None,
        top_logprobs_num: int = 0,
    ) -> list[Any]:
        assert prompt is None
        assert return_logprob
        self.recorded.n_calls += 1
        starts = logprob_start_len or [len(ids) - 1 for ids in input_ids]
        return [
            self._answer(ids, start, top_logprobs_num, sampling_params)
            for ids, start in zip(input_ids, starts, strict=True)
        ]

    def _answer(self, ids: list[int], start: int, k: int, how: dict[str, Any]) -> dict[str, Any]:
        self.recorded.cached(ids, start)
        told = self.recorded.log_probs(ids)
        # Its ids of tokens at the vocabulary's end are clipped, as those of images are.
        shown = [i if i < told.shape[-1] - 1 else 0 for i in ids]
        values = [None, *(float(told[i - 1, ids[i]]) for i in range(start + 1, len(ids)))]
        tops: list[Any] = [None, *(_likeliest(told[i - 1], k) for i in range(start + 1, len(ids)))]
        wrote = self.recorded.written(ids, how["max_new_tokens"], how["temperature"])
        about = {
            "input_token_logprobs": [
                (v, i, None) for v, i in zip(values, shown[start:], strict=True)
            ],
            "output_token_logprobs": [(float(at[i]), i, None) for i, at in wrote],
            "output_top_logprobs": [_likeliest(at, k) for _, at in wrote],
            "finish_reason": {"type": "length"},
        }
        about |= {"input_top_logprobs": tops} if k else {}
        return {"meta_info": about}


def _likeliest(told: torch.Tensor, k: int) -> list[tuple[float, int, None]]:
    best = told.topk(k)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(value, token, None) for value, token in pairs]
