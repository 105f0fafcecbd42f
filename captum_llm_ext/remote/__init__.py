"""Models that an API serves, or an inference engine of this process.

`CompletionsProvider` asks servers with OpenAI's completions endpoint by token ids, `EngineProvider`
an engine. `providers` knows what can be asked of whom, `handshake` whether it can be believed,
`scorer` what has to be asked, `workers`, `transport` and `connection` how it is done; `rung`,
`stepwise`, `label` and `sampled` are for servers that tell less. Their attribution is
`captum_llm_ext.attribution.remote`.
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
