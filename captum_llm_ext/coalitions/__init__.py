"""Which coalitions of features to score, and what their values say about each feature."""

from captum_llm_ext.coalitions.enumeration import solve_exact, solve_leave_one_out
from captum_llm_ext.coalitions.kernel import solve_kernel
from captum_llm_ext.coalitions.lime import cosine_kernel, solve_lime
from captum_llm_ext.coalitions.permutations import solve_permutations
from captum_llm_ext.coalitions.plans import (
    Plan,
    join_plans,
    plan_anchors,
    plan_exact,
    plan_leave_one_out,
    plan_lime,
    plan_pairs,
    plan_permutations,
)
from captum_llm_ext.coalitions.scope import Scope, Solution

__all__ = [
    "Plan",
    "Scope",
    "Solution",
    "cosine_kernel",
    "join_plans",
    "plan_anchors",
    "plan_exact",
    "plan_leave_one_out",
    "plan_lime",
    "plan_pairs",
    "plan_permutations",
    "solve_exact",
    "solve_kernel",
    "solve_leave_one_out",
    "solve_lime",
    "solve_permutations",
]
