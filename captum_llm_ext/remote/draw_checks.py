"""Whether a provider samples at all: tested by an open question."""

from dataclasses import replace
from typing import Literal

from captum_llm_ext.remote.chat_endpoint import ChatRequest
from captum_llm_ext.remote.metered import MeteredEndpoint

OPEN = "Write ten random words, and then ten random numbers."
# Number of answers, and their length. Words said to be random agree over 24 tokens by chance in no
# sampling model; more answers would only cost more. Chosen, not measured.
_N, _N_TOKENS = 2, 24
Draws = Literal["vary", "never vary", "unknown"]


def check_draws(endpoint: MeteredEndpoint, temperature: float) -> tuple[Draws, str]:
    """Sends an open question several times.

    If one request returns several equal answers, but another request a different one, answers are
    requested one by one from now on.

    Returns:
        Whether answers vary, and how this was found.
    """
    question = ChatRequest(
        [{"role": "user", "content": OPEN}], n_tokens=_N_TOKENS, temperature=temperature
    )
    # From one request if it returns several, and from another one with another seed.
    first = [one.text for one in endpoint.answers(question, range(_N), at_once=True)]
    if len(set(first)) > 1:
        return "vary", f"{len(set(first))} answers of {len(first)} to an open question"
    repeated = endpoint.uncached(replace(question, seed=len(first)))
    second = [one.text for one in repeated]
    if not any(text.strip() for text in first + second):
        return "unknown", "an open question is answered by nothing"
    if set(first) == set(second):
        return "never vary", "an open question has the same answer each time"
    if len(first) > 1:
        endpoint.limit_to_one()
        return "vary", "those of one request are copies of one: each is asked for by itself"
    return "vary", "each request has another answer to an open question"
