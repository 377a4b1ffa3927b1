"""`dpo-wrapper evaluate`."""
