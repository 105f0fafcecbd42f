"""Which coalitions of features to score, and how their values are solved for attributions.

A plan comes from `plan_anchors` (all features and none) joined with one of the planners; the solver
of the same name turns its values into attributions and standard errors::

    plan = join_plans([plan_anchors(n), plan_pairs(n, 16 * n, generator=generator)])
    solution = solve_kernel(plan, score(plan.masks), Scope.of_all(n_target, n))

* `plan_exact`, `solve_exact`: Shapley values of up to a dozen features, 2^n coalitions.
* `plan_pairs`, `solve_kernel`: Shapley values of more features; the usual choice, at any budget
  from 2 n on.
* `plan_permutations`, `solve_permutations`: the same without bias, and with exact zeros for
  features that change nothing; a few times less accurate.
* `hierarchy`, `splits`: Owen values, where features are nested.
* `plan_leave_one_out`, `solve_leave_one_out` and its complement `plan_only_one_in`,
  `solve_only_one_in`: what is necessary, and what is sufficient, in n coalitions.
* `search`: leave-one-out that is refined only where it matters, for thousands of features.
* `plan_lime`, `solve_lime`, `solve_contextcite`: a sparse linear model, if few features matter.

`without_draw_effects` takes the noise of randomly drawn replacement texts out of the values first.
`stopping` has rules for when enough were scored; `two_levels` corrects a surrogate's values, for
which `solve_few_pairs` needs a handful of pairs.

`causal_scope` defines which features a target token depends on; `additivity` and `interactions` are
about joint effects of features.
"""

from captum_llm_ext.coalitions.additivity import RedundantPair, additive_fit, redundant_pairs
from captum_llm_ext.coalitions.causal_scope import Scope, Solution
from captum_llm_ext.coalitions.contextcite import logit_scaled, solve_contextcite
from captum_llm_ext.coalitions.draw_effects import DrawnTexts, without_draw_effects
from captum_llm_ext.coalitions.enumeration import (
    solve_exact,
    solve_leave_one_out,
    solve_only_one_in,
)
from captum_llm_ext.coalitions.few_pairs import solve_few_pairs
from captum_llm_ext.coalitions.kernel import solve_kernel
from captum_llm_ext.coalitions.lime import cosine_kernel, solve_lime
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
from captum_llm_ext.coalitions.stopping import Precision, StoppingRule, TopCauses

__all__ = [
    "DrawnTexts",
    "Plan",
    "Precision",
    "RedundantPair",
    "Scope",
    "Solution",
    "StoppingRule",
    "TopCauses",
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
    "solve_few_pairs",
    "solve_kernel",
    "solve_leave_one_out",
    "solve_lime",
    "solve_only_one_in",
    "solve_permutations",
    "without_draw_effects",
]
