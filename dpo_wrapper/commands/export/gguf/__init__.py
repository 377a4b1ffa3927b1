"""GGUF files for llama.cpp: of whole models, and what reads them back."""
