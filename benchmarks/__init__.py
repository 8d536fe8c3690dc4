"""Measurements against PyTorch and other libraries, run from the repository's root; none of this is installed.

python -m benchmarks.train_step     a whole training step against PyTorch's, eager and compiled
python -m benchmarks.device         everything that a lent GPU should measure, within a time budget
python -m benchmarks.report         tables, plots and one HTML page from benchmarks/results/*.json
"""
