"""The intra-op program: arrays in, one strategy per node out. Imports no torch."""
