"""Which coalitions of features to score, and what their values say about each feature."""

from captum_llm_ext.coalitions.additivity import RedundantPair, additive_fit, redundant_pairs
from captum_llm_ext.coalitions.enumeration import (
    solve_exact,
    solve_leave_one_out,
    solve_only_one_in,
)
from captum_llm_ext.coalitions.kernel import solve_kernel
from captum_llm_ext.coalitions.lime import (
    cosine_kernel,
    logit_scaled,
    solve_contextcite,
    solve_lime,
)
from captum_llm_ext.coalitions.permutations import part_errors, solve_permutations
from captum_llm_ext.coalitions.plans import (
    Plan,
    join_plans,
    plan_anchors,
    plan_exact,
    plan_leave_one_out,
    plan_lime,
    plan_only_one_in,
    plan_pairs,
    plan_permutations,
)
from captum_llm_ext.coalitions.scope import Scope, Solution

__all__ = [
    "Plan",
    "RedundantPair",
    "Scope",
    "Solution",
    "additive_fit",
    "cosine_kernel",
    "join_plans",
    "logit_scaled",
    "part_errors",
    "plan_anchors",
    "plan_exact",
    "plan_leave_one_out",
    "plan_lime",
    "plan_only_one_in",
    "plan_pairs",
    "plan_permutations",
    "redundant_pairs",
    "solve_contextcite",
    "solve_exact",
    "solve_kernel",
    "solve_leave_one_out",
    "solve_lime",
    "solve_only_one_in",
    "solve_permutations",
]
