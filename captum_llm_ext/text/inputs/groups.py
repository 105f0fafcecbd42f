"""Spans merged into one feature, however far apart, and labels of spans."""

from collections.abc import Mapping, Sequence

from captum_llm_ext.text.segment import shorten

Groups = Sequence[Sequence[str | int]] | Mapping[str, Sequence[str | int]]


def tie(names: Sequence[str], groups: Groups | None) -> tuple[list[int], list[str]]:
    """The feature of every span, and every feature's name.

    A group is placed at its first span; a span in no group is a feature by itself.

    Args:
        names: One per span, in reading order.
        groups: Lists of names (ignoring white space at their ends) or indices of spans; or a
            mapping from the feature's name to such a list.

    Raises:
        ValueError: If a group is empty, a name matches no span or several, or a span is in two
            groups.
        TypeError: If a member is neither a name nor an integer.
    """
    titled = groups.items() if isinstance(groups, Mapping) else ((None, g) for g in groups or ())
    tied: dict[int, int] = {}
    titles: list[str | None] = []
    for number, (title, members) in enumerate(titled):
        if isinstance(members, str) or not len(members):
            raise ValueError(
                f"group {members!r} is not a list of spans: give their texts or numbers."
            )
        for member in members:
            span = _find(names, member)
            if span in tied:
                raise ValueError(
                    f"span {names[span]!r} is in two groups: a span belongs to one feature."
                )
            tied[span] = number
        titles.append(title)
    keys = [("tied", tied[i]) if i in tied else ("own", i) for i in range(len(names))]
    order = {key: feature for feature, key in enumerate(dict.fromkeys(keys))}
    feature_of = [order[key] for key in keys]
    own_names: list[list[str]] = [[] for _ in order]
    for name, feature in zip(names, feature_of, strict=True):
        own_names[feature].append(name)
    shown = [" …".join(own) for own in own_names]
    for (kind, number), feature in order.items():
        if kind == "tied":
            shown[feature] = titles[number] or shown[feature]
    return feature_of, shown


def label_spans(
    names: Sequence[str], labels: Sequence[str | None] | Mapping[str | int, str] | None
) -> list[str | None]:
    """The label of every span.

    Args:
        names: One per span, in reading order.
        labels: One per span; or a mapping from names or indices of spans. None: no labels.

    Raises:
        ValueError: If the numbers of labels and spans differ, or a key matches no span.
        TypeError: If a key is neither a name nor an integer, or a label is not a text.
    """
    found: list[str | None] = [None] * len(names)
    if isinstance(labels, Mapping):
        for key, label in labels.items():
            found[_find(names, key)] = label
    elif labels is not None:
        if isinstance(labels, str) or len(labels) != len(names):
            raise ValueError(
                f"`labels` has {len(labels)} entries for {len(names)} spans: give one (or None) "
                "each, or a mapping from spans to labels."
            )
        found = list(labels)
    wrong = [label for label in found if label is not None and not isinstance(label, str)]
    if wrong:
        raise TypeError(f"`labels` holds {wrong[0]!r}: a label is a text such as 'city'.")
    return found


def _find(names: Sequence[str], member: str | int) -> int:
    if isinstance(member, int) and not isinstance(member, bool):
        if not 0 <= member < len(names):
            raise ValueError(
                f"a group or label names span {member}: there are {len(names)}, numbered from 0."
            )
        return member
    if not isinstance(member, str):
        raise TypeError(
            f"a group or label holds {member!r}: give the text or the number of a span."
        )
    found = [i for i, name in enumerate(names) if name.strip() == member.strip()]
    if not found:
        known = ", ".join(repr(shorten(name.strip())) for name in names[:12])
        raise ValueError(
            f"a group or label names {member!r}, which is not a span: the spans are {known}…"
        )
    if len(found) > 1:
        raise ValueError(
            f"a group or label names {member!r}, which {len(found)} spans are: say which by "
            f"number, one of {found}."
        )
    return found[0]
