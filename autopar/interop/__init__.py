"""The inter-op pass: cut the layers into stages and give each a submesh. Arrays only, no torch."""
