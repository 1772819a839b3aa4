"""Low-rank linear algebra: QR instead of dense SVDs, Gram products, budgets, bases; float64, one thread, no files."""
