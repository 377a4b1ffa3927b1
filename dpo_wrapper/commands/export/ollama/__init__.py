"""A GGUF file with a Modelfile for Ollama."""
