"""Pure functions from scores to figures with intervals."""
