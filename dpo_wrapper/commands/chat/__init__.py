"""Talk with a model in the terminal: `dpo-wrapper chat`."""
