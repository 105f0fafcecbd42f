"""Plots of attributions. The only part that imports matplotlib, and only when it draws.

Plain arrays in, ``(fig, ax)`` out; all functions take `ax`, `show`, `title` and `unit` (see
`axes.Canvas`). Red lowers and blue raises, as in captum's bars; signs can also be read without
colour. Global matplotlib settings are read, never changed.
"""

from captum_llm_ext.result.plot.bars import bars, convergence
from captum_llm_ext.result.plot.curves import perturbation_curves
from captum_llm_ext.result.plot.flow import flow
from captum_llm_ext.result.plot.heads import head_map
from captum_llm_ext.result.plot.heat_maps import baseline_map, heat_map
from captum_llm_ext.result.plot.layer_maps import patching_map
from captum_llm_ext.result.plot.shaded_text import running_text

__all__ = [
    "bars",
    "baseline_map",
    "convergence",
    "flow",
    "head_map",
    "heat_map",
    "patching_map",
    "perturbation_curves",
    "running_text",
]
