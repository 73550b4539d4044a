"""The parts of bench.py, and benchmarks that run by themselves (`python -m benchmarks.NAME`)."""
