"""ContextCite from the coalitions of Lime, against scikit-learn and a plain forward."""

import numpy as np
import pytest
import torch
from captum.attr import KernelShap, Lime
from sklearn.linear_model import Lasso

from captum_llm_ext import CorpusBaselines, GenerationAttribution, TextSegmentInput, load_demo

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"


@pytest.fixture(scope="module")
def result():
    model, tokenizer, texts = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    return GenerationAttribution(Lime(model), tokenizer).attribute(
        inp, " poker, surfing and history.", output_unit=None, n_samples=64
    )


@pytest.mark.parametrize("span", [(0, 6), (2, 3), (4, 5)])
def test_statement_fit_equals_scikit_learn(result, span):
    start, stop = span
    sampled = result.masks[result.design.n_anchors :].double().numpy()
    log_p = result.values[result.design.n_anchors :, start:stop].double().sum(1)
    log_odds = (log_p - torch.log(-torch.expm1(log_p.clamp_max(-1e-7)))).numpy() / (stop - start)
    scale = sampled.std(0)
    fitted = Lasso(alpha=0.01, tol=1e-10, max_iter=100_000).fit(
        (sampled - sampled.mean(0)) / scale, log_odds
    )
    found = result.contextcite(start, stop)
    expected = fitted.coef_ / scale * (stop - start)
    assert found.values.numpy() == pytest.approx(expected, abs=1e-4)
    assert np.isnan(found.standard_errors.numpy()).all()


def test_statement_attribution_is_sparse_on_the_cause(result):
    found = result.contextcite(2, 3)
    assert found.top(1)[0].name.strip() == "Palm"
    assert result.contextcite(2, 3, alpha=1.0).values.count_nonzero() < 5
    assert len(result.contextcite().tokens) == 6


def test_shapley_coalitions_are_refused(result):
    model, tokenizer, texts = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    shap = GenerationAttribution(KernelShap(model), tokenizer).attribute(
        inp, " poker", output_unit=None, n_samples=64
    )
    with pytest.raises(ValueError, match="attribute with Lime"):
        shap.contextcite()
    with pytest.raises(ValueError, match="no target token from 9"):
        result.contextcite(9, 12)


def test_tokens_of_different_scopes_are_refused():
    model, tokenizer, texts = load_demo()
    inp = TextSegmentInput(PROMPT, tokenizer, baselines=CorpusBaselines(texts))
    grown = GenerationAttribution(Lime(model), tokenizer).attribute(
        inp, " poker, surfing", n_samples=64
    )
    with pytest.raises(ValueError, match="output_unit=None"):
        grown.contextcite(0, 3)
    assert grown.contextcite(2, 3).top(1)[0].name.strip() == "Palm"
