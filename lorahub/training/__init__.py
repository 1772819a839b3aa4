"""Training adapters: what is trained, where it lives in the model, and how it gets back into files."""
