"""Models behind an API, or in an inference engine of this process.

`CompletionsProvider` is for servers with OpenAI's completions endpoint, by token ids,
`EngineProvider` for an engine. `providers` adapts providers, `handshake` verifies their
log-probabilities, `scorer` determines the requests, `workers`, `transport` and `connection` send
them; `rung`, `stepwise`, `label` and `sampled` are for servers that report less. `proposals` and
`step_proposals` propose texts for absent features, by prompts (`told`) or token by token. The
attribution class is in `captum_llm_ext.attribution.remote`.
"""

from captum_llm_ext.remote.chat_providers import AnthropicProvider, CallableProvider, ChatProvider
from captum_llm_ext.remote.completions import CompletionsProvider
from captum_llm_ext.remote.engines import EngineProvider
from captum_llm_ext.remote.estimate import Estimate
from captum_llm_ext.remote.providers import TokenProvider
from captum_llm_ext.remote.transport import ApiError

__all__ = [
    "AnthropicProvider",
    "ApiError",
    "CallableProvider",
    "ChatProvider",
    "CompletionsProvider",
    "EngineProvider",
    "Estimate",
    "TokenProvider",
]
