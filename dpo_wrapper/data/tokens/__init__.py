"""Examples -> token ids: tokenizers, chat templates, and what is too long."""
