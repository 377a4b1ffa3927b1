"""What is wrong with rows as a set: contradictions, duplicates, leaks, cuts, labels."""

import numpy as np

from dpo_wrapper.data.lint.features import DATASET_TYPES, SPLITS
from dpo_wrapper.data.lint.findings import (
    MIN_ROWS,
    Check,
    Counts,
    FeatureMap,
    Finding,
    count_rows,
    make_finding,
)
from dpo_wrapper.data.lint.near_duplicates import find_first, find_near_duplicates

DUPLICATE_SHARE = 0.01
"""Share of rows that repeat another one, exactly or nearly."""

TIED_SHARE = 0.2
"""Share of rows without a better completion, or with completions as good as others."""

CUT_SHARE = 0.1
"""Share of rows that lost tokens."""

LABEL_SHARE = 0.1
"""Share of the rarer label."""

PADDED_ROWS = 8
"""Rows of a batch, to say what padding costs."""


def check_contradictions(features: FeatureMap, counts: Counts) -> list[Finding]:
    """The same completions of the same prompt in both orders, or one with both labels."""
    order = np.argsort(features["unordered_digest"], kind="stable")
    keys, contents = features["unordered_digest"][order], features["content_digest"][order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    group = np.cumsum(is_first) - 1
    is_other = (contents != contents[is_first][group]).any(1)
    groups = np.unique(group[is_other])
    if not len(groups):
        return []
    rows = order[np.isin(group, groups)]  # those that contradict each other stay together
    fact = (
        f"{count_rows(len(rows))} in {count_rows(len(groups), 'group')} contradict each other, with the same "
        "prompt and completions in another order or with another label"
    )
    numbers = {"rows": len(rows), "groups": len(groups)}
    return [make_finding("contradictions", True, fact, "keep those that are right", rows, numbers)]


def check_duplicates(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Rows that repeat another one, exactly or nearly, count more than others and may leak."""
    contents = features["content_digest"]
    is_first = find_first(contents)
    repeats, kept = np.flatnonzero(~is_first), np.flatnonzero(is_first)
    first = find_near_duplicates(features["signature"][kept])
    near = np.flatnonzero(first != np.arange(len(kept)))
    pairs = np.stack([kept[first[near]], kept[near]], axis=1)
    is_test = features["split"] == SPLITS.index("test")
    leaked = int((is_test[pairs[:, 0]] != is_test[pairs[:, 1]]).sum())
    across = f", {leaked:,} of them across the split" if leaked else ""
    findings = []
    for name, rows, number, what in (
        ("duplicates", repeats, len(repeats), "equal an earlier one"),
        ("near_duplicates", pairs.reshape(-1), len(near), f"nearly equal an earlier one{across}"),
    ):
        if number:
            share = number / len(contents)
            fact = f"{number:,} of {count_rows(len(contents))} ({share:.1%}) {what}"
            numbers = {"rows": number, "share": share}
            is_problem = share >= DUPLICATE_SHARE
            findings.append(make_finding(name, is_problem, fact, "keep one of each", rows, numbers))
    return findings


def check_split_overlap(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Prompts on both sides of the split: what is evaluated was trained on."""
    is_test, prompts = features["split"] == SPLITS.index("test"), features["prompt_digest"]
    tests = np.flatnonzero(is_test)
    rows = tests[np.isin(prompts[tests], prompts[~is_test])]
    if not len(rows):
        return []
    fact = f"The prompts of {len(rows):,} of {count_rows(len(tests))} to evaluate on are trained on as well"
    numbers = {"rows": len(rows), "share": len(rows) / len(tests)}
    remedy = "move all rows of a prompt to one side of the split"
    return [make_finding("split_overlap", True, fact, remedy, rows, numbers)]


def check_ties(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Completions as good as each other make no pair."""
    tied = counts.get("tied", 0)
    num_lists = int((features["num_completions"] > 1).sum())
    rows = np.flatnonzero(features["num_ties"])
    if not tied and not len(rows):
        return []
    share = (tied + len(rows)) / (tied + num_lists)
    fact = (
        f"No completion is better in {count_rows(tied)}, which are left out, and {len(rows):,} of "
        f"{count_rows(num_lists, 'list')} that are kept have ties"
    )
    numbers = {"tied": tied, "lists": len(rows), "share": share}
    return [make_finding("ties", share >= TIED_SHARE, fact, "take finer scores", rows, numbers)]


def check_cuts(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Rows that were too long."""
    rows = np.flatnonzero(features["is_cut"])
    if not len(rows):
        return []
    share = len(rows) / len(features["is_cut"])
    fact = (
        f"{len(rows):,} of {count_rows(len(features['is_cut']))} ({share:.1%}) were too long and lost tokens"
    )
    nouns = {"shortened_prompts": "prompt", "truncated_completions": "completion"}
    parts = [count_rows(counts[name], noun) for name, noun in nouns.items() if name in counts]
    fact += f" ({' and '.join(parts)})" if parts else ""
    numbers = {"rows": len(rows), "share": share, **{name: counts[name] for name in nouns if name in counts}}
    remedy = "raise --max-length (or --max-prompt-length), or leave such rows out"
    return [make_finding("cuts", share >= CUT_SHARE, fact, remedy, rows, numbers)]


def check_prefix_sharing(features: FeatureMap, counts: Counts) -> list[Finding]:
    """What is computed if a common prefix stands once, as in a prefix tree, and without."""
    total, unique = (int(features[name].sum(dtype=np.int64)) for name in ("num_tokens", "num_unique_tokens"))
    if not total:
        return []
    starts = np.arange(0, len(features["longest"]), PADDED_ROWS)
    widths = np.maximum.reduceat(features["longest"], starts).astype(np.int64)
    padded = int((widths * np.add.reduceat(features["num_completions"], starts)).sum())
    fact = (
        f"{unique:,} of {total:,} tokens ({unique / total:.1%}) are computed if common prefixes are "
        f"shared; batches of {PADDED_ROWS} rows have {padded:,} with padding"
    )
    numbers = {"tokens": total, "unique": unique, "padded": padded}
    return [make_finding("prefix_sharing", False, fact, "", (), numbers)]


def check_labels(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Labels of which one is rare."""
    label = features["label"]
    desirable, undesirable = (np.flatnonzero(label == value) for value in (1, 0))
    number = len(desirable) + len(undesirable)
    if not number:
        return []
    share = len(desirable) / number
    fact = f"{len(desirable):,} of {count_rows(number, 'labelled row')} ({share:.1%}) are desirable"
    is_problem = min(share, 1 - share) < LABEL_SHARE
    remedy = "add rows of the rarer label, or weight them by a column 'weight'"
    rare = min(desirable, undesirable, key=len) if is_problem else ()
    numbers = {"desirable": len(desirable), "undesirable": len(undesirable)}
    return [make_finding("labels", is_problem, fact, remedy, rare, numbers)]


def check_sizes(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Rows of each dataset type, of which there may be too few."""
    findings = []
    for index, name in enumerate(DATASET_TYPES):
        rows = np.flatnonzero(features["dataset_type"] == index)
        if 0 < len(rows) < MIN_ROWS:
            fact = f"There {'is' if len(rows) == 1 else 'are'} only {count_rows(len(rows))} of type {name}"
            numbers = {"type": name, "rows": len(rows)}
            findings.append(
                make_finding("few_rows", True, fact, "add some, or leave them out", rows, numbers)
            )
    return findings


def check_left_out(features: FeatureMap, counts: Counts) -> list[Finding]:
    """Rows that were refused, and duplicates that were left out."""
    refused, duplicates = counts.get("refused", 0), counts.get("duplicates", 0)
    if not refused and not duplicates:
        return []
    fact = (
        f"Of {count_rows(counts.get('read', 0))}, {refused:,} {'was' if refused == 1 else 'were'} refused "
        f"and {duplicates:,} left out as {'a duplicate' if duplicates == 1 else 'duplicates'}"
    )
    return [make_finding("left_out", False, fact, "", (), {"refused": refused, "duplicates": duplicates})]


ROW_CHECKS: tuple[Check, ...] = (
    check_contradictions, check_duplicates, check_split_overlap, check_ties, check_cuts, check_labels,
    check_sizes, check_left_out, check_prefix_sharing,
)  # fmt: skip
