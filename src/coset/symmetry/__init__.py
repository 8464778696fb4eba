"""Crystal symmetry: space groups, projection, certificates."""
