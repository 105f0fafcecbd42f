"""`Smile`: Lime with the distance between answers as response."""

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from captum.attr._utils.attribution import PerturbationAttribution
from torch import Tensor, nn

Distance = Callable[[str, str], float]

_SINKHORN_STEPS = 200  # number of Sinkhorn iterations; chosen, not measured
_INVERSE_TEMPERATURE = (
    100.0  # largest cost over the weight of the entropy: plans are within a percent of the optimum
)


class Smile(PerturbationAttribution):
    """Attributes the answer as a whole, by how far it changes without each feature.

    SMILE (Dehghani et al. 2025, arXiv 2505.21657): coalitions are drawn as for `Lime`, the model
    *answers* each, and a weighted linear model is fitted to the distance between its answer and
    that to the whole prompt. One attribution per prompt feature, for the answer as a whole: by how
    much its presence reduces the distance. It needs no log-probabilities, so it also works for
    models that return only text.

    If log-probabilities are available, it is the weakest method here: an answer either changes or
    not, and each coalition costs a generation, where others take one forward pass for all tokens.

    Samples are weighted by ``sqrt(exp(-d^2 / sigma^2))``, where ``d`` is the cosine distance of
    their mask to the full one: the kernel of captum's `Lime`. With a distance of 0 or 1 it is
    `Lime` on whether the answer is unchanged. The authors' code deletes words for a few
    perturbations, weights them by the Wasserstein distance of *prompts* on word vectors, samples
    one answer each, and uses scikit-learn's linear regression; here absent features are replaced by
    the input's baselines, answers are greedy unless `gen_args` says otherwise, and standard errors
    are reported.

    Args:
        forward_func: The model, or captum's placeholder for a model behind an API.
        distance: Of two answers: ``"tokens"``, the Wasserstein distance between the model's
            embeddings of their tokens; ``"words"``, the same with the tokens of a word averaged; or
            any callable ``(answer, other) -> number``, larger for more different answers.
        sigma: Width of the kernel.
        alpha: Strength of a ridge penalty; 0: none.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        distance: Literal["tokens", "words"] | Distance = "tokens",
        *,
        sigma: float = 1.0,
        alpha: float = 0.0,
    ) -> None:
        super().__init__(forward_func)
        if not callable(distance) and distance not in ("tokens", "words"):
            raise ValueError(
                f"`distance` is {distance!r}: give 'tokens', 'words' or a callable of two texts."
            )
        if not sigma > 0 or not alpha >= 0:
            raise ValueError(f"`sigma` is {sigma}, `alpha` {alpha}: give positive numbers.")
        self.distance, self.sigma, self.alpha = distance, sigma, alpha

    def attribute(self, *_: Any, **__: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        """Raises: tensors have no generated answer.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "`Smile` compares answers, which plain tensors do not have: give it to "
            "`GenerationAttribution` or `RemoteGenerationAttribution`."
        )

    def distance_function(self, model: Any, tokenizer: Any) -> Distance:
        """The distance of two answers.

        Args:
            model, tokenizer: Embed tokens, for the built-in distances.

        Returns:
            A callable ``(answer, other) -> number``, 0 for equal texts. The built-in ones are mean
            cosine distances, from 0 to 2.

        Raises:
            TypeError: If a built-in one is requested, and the model has no embeddings.
        """
        distance = self.distance
        if not isinstance(distance, str):
            return distance
        find = getattr(model, "get_input_embeddings", None)
        table = find() if callable(find) else None
        if not isinstance(table, nn.Module) or not hasattr(table, "weight"):
            raise TypeError(
                f"`distance` {distance!r} takes the embeddings of a model of this process: give a "
                "callable of two texts, such as one that embeds both."
            )
        embed = _by_token if distance == "tokens" else _by_word

        def between(answer: str, other: str) -> float:
            if answer == other:
                return 0.0
            return wasserstein(*(embed(text, tokenizer, table) for text in (answer, other)))

        return between


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The Wasserstein distance of two sets of vectors, with cosine distances as costs.

    Solved by Sinkhorn's iteration (Cuturi 2013), then rounded to a transport plan (Altschuler et
    al. 2017, algorithm 2): at most a percent above the minimum. 1 if one set is empty.

    Args:
        a, b: Shape ``(n, width)`` and ``(m, width)``; vectors have equal weight.
    """
    if not len(a) or not len(b):
        return float(len(a) != len(b))
    a, b = (nn.functional.normalize(x.detach().double().cpu(), dim=1) for x in (a, b))
    cost = (1 - a @ b.T).clamp_min(0)
    largest = float(cost.max())
    if largest < 1e-9:
        return 0.0
    kernel = -cost * (_INVERSE_TEMPERATURE / largest)
    rows = torch.full((len(a),), 1 / len(a), dtype=cost.dtype, device="cpu")
    columns = torch.full((len(b),), 1 / len(b), dtype=cost.dtype, device="cpu")
    u, v = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(_SINKHORN_STEPS):
        u = rows.log() - (kernel + v).logsumexp(1)
        v = columns.log() - (kernel + u[:, None]).logsumexp(0)
    plan = (kernel + u[:, None] + v).exp()
    plan = plan * (rows / plan.sum(1)).clamp_max(1)[:, None]
    plan = plan * (columns / plan.sum(0)).clamp_max(1)
    left, right = rows - plan.sum(1), columns - plan.sum(0)
    rest = float(left.sum())
    plan = plan + torch.outer(left, right) / rest if rest > 1e-12 else plan
    return max(float((plan * cost).sum()), 0.0)


def _by_token(text: str, tokenizer: Any, table: Any) -> Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = torch.tensor(list(ids), dtype=torch.int64, device=table.weight.device)
    return table.weight[at]


def _by_word(text: str, tokenizer: Any, table: Any) -> Tensor:
    words = [_by_token(f" {word}", tokenizer, table).double().mean(0) for word in text.split()]
    return torch.stack(words) if words else table.weight[:0]
