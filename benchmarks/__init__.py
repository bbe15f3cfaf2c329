"""Measurements that anyone can repeat: `make bench` for ratios, `python -m benchmarks.tin40` for the learning runs."""
