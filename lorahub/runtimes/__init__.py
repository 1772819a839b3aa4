"""What serving runtimes accept, as tables: ``lorahub check --for NAME``."""
