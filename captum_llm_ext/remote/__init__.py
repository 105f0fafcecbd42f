"""Attribution of models that an API serves.

`RemoteGenerationAttribution` is captum's `RemoteLLMAttribution` with all of this package's
estimators; `CompletionsProvider` asks servers with OpenAI's completions endpoint by token ids.
`providers` knows what can be asked of whom, `handshake` whether it can be believed, `scorer` what
has to be asked, `workers` and `transport` how it is done.
"""

from captum_llm_ext.remote.attribution import Estimate, RemoteGenerationAttribution
from captum_llm_ext.remote.completions import CompletionsProvider
from captum_llm_ext.remote.providers import TokenProvider
from captum_llm_ext.remote.speakers import AnthropicProvider, CallableProvider, ChatProvider
from captum_llm_ext.remote.transport import ApiError

__all__ = [
    "AnthropicProvider",
    "ApiError",
    "CallableProvider",
    "ChatProvider",
    "CompletionsProvider",
    "Estimate",
    "RemoteGenerationAttribution",
    "TokenProvider",
]
