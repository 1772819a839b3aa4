"""lorahub: LoRA-family adapters as dependable, versioned artefacts."""

__version__ = "0.1.0"
