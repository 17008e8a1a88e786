"""What needs a GPU: rows 1 to 5 of docs/performance.md. `python -m benchmarks.gpu` runs all parts, each also alone."""
