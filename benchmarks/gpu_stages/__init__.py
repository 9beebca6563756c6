"""What ``benchmarks/gpu.py`` runs on a GPU: one subject a file."""
