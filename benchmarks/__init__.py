"""The parts of bench.py: what is run, on which engine, against which floor."""
