"""Faithfulness of attributions to the model: metrics that remove features and rescore.

`measure_faithfulness` measures results of one target on one input. The other functions take any
attributions and any game, a function of coalitions.
"""

from captum_llm_ext.evaluation.faithfulness.estimate import Estimate
from captum_llm_ext.evaluation.faithfulness.game_metrics import (
    comprehensiveness,
    linear_datamodeling_score,
    measure_attributions,
    perturbation_curve,
    sufficiency,
)
from captum_llm_ext.evaluation.faithfulness.measure import measure_faithfulness
from captum_llm_ext.evaluation.faithfulness.report import FaithfulnessReport
from captum_llm_ext.evaluation.faithfulness.scores import Metric, PerturbationCurve

__all__ = [
    "Estimate",
    "FaithfulnessReport",
    "Metric",
    "PerturbationCurve",
    "comprehensiveness",
    "linear_datamodeling_score",
    "measure_attributions",
    "measure_faithfulness",
    "perturbation_curve",
    "sufficiency",
]
