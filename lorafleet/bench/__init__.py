"""Benchmarks against peers and floors; records go to ``benchmarks/results/``."""
