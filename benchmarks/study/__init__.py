"""Parts of benchmarks/compare.py: what a study file says, its runs, its tables."""
