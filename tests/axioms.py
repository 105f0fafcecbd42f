"""Which axioms every method of the package satisfies through a model, as `test_axioms_of_models`
finds: `python tests/axioms.py` prints the table."""

AXIOMS = {
    "completeness": "attributions sum to the value less its empty value",
    "sensitivity": "what alone changes the value gets something",
    "dummy": "what the model cannot see gets nothing",
    "symmetry": "what plays the same part gets the same",
    "linearity": "the sum of two values gets the sum of their attributions",
    "implementation": "a model written in another way (another kernel of attention, q and k "
    "scaled, weights fused, a layer that adds nothing, other coordinates) gets the same",
}
_ALL = set(AXIOMS)
# Of methods that attribute no value these say nothing.
OF_A_VALUE = {"completeness", "sensitivity", "linearity"}
WITHOUT_A_VALUE = {
    "AttentionWeights",
    "AttentionRollout",
    "AttentionRollout, values",
    "AttentionRollout, ALTI",
    "AttentionRollout, projection",
}
HOLDS = {
    "FeatureAblation": _ALL - {"completeness"},
    "FeatureInclusion": _ALL - {"completeness"},
    "ShapleyValues": _ALL,
    "ShapleyValueSampling": _ALL - {"symmetry"},
    "KernelShap": _ALL,
    "Lime": {"sensitivity", "implementation"},
    "PartitionShap": _ALL,
    "HierarchicalAblation": _ALL - {"completeness", "linearity"},
    "LayerIntegratedGradients": _ALL,
    "LayerGradientXActivation": _ALL - {"completeness", "sensitivity"},
    "LayerGradientShap": _ALL - {"completeness"},
    "LayerSaliency": {"dummy", "symmetry", "implementation"},
    "EquivalentLinearSystem": _ALL - {"sensitivity"},
    "EquivalentLinearSystem, L2": {"dummy", "symmetry", "implementation"},
    "AttentionWeights": {"dummy", "symmetry"},
    "AttentionRollout": {"dummy", "symmetry"},
    "AttentionRollout, values": {"dummy", "symmetry", "implementation"},
    "AttentionRollout, ALTI": {"dummy", "symmetry"},
    "AttentionRollout, projection": {"dummy", "symmetry", "implementation"},
}


def table() -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(AXIOMS) + " |", "|---|" + "---|" * len(AXIOMS)]
    for method, holds in HOLDS.items():
        none = OF_A_VALUE if method in WITHOUT_A_VALUE else ()
        cells = " | ".join(
            "–" if axiom in none else "yes" if axiom in holds else "no" for axiom in AXIOMS
        )
        lines.append(f"| `{method}` | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
