"""The parts of benchmarks/train.py: what both sides are given, both sides, gates and figures."""
