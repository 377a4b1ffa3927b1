"""Preference pairs where there are none: `dpo-wrapper pairs`."""
