"""The intra-op pass: a strategy for each operator of a stage. Its solver files are pure numpy."""
