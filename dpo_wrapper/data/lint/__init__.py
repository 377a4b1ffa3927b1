"""What is wrong with a data set: length bias, contradictions, duplicates, give-aways, cuts."""

from dpo_wrapper.data.lint.features import measure_rows
from dpo_wrapper.data.lint.findings import Counts, FeatureMap, Finding, format_findings
from dpo_wrapper.data.lint.rows import ROW_CHECKS
from dpo_wrapper.data.lint.sides import SIDE_CHECKS

__all__ = ["Finding", "find_problems", "format_findings", "measure_rows"]


def find_problems(features: FeatureMap, counts: Counts) -> list[Finding]:
    """What is wrong with the rows of a data set, problems before information.

    Args:
        features: of `measure_rows`, concatenated over all rows that are trained on.
        counts: of rows: 'read', 'refused', 'duplicates' (left out as equal to an earlier row) and 'tied'
            (left out because no completion is better), and 'shortened_prompts' and 'truncated_completions'.
            What is not given is 0.
    """
    findings = [finding for check in (*SIDE_CHECKS, *ROW_CHECKS) for finding in check(features, counts)]
    return sorted(findings, key=lambda finding: not finding.is_problem)
