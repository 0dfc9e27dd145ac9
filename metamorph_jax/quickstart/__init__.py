"""The quick start: real weights and real data from the Python registry, minutes on two cores."""
