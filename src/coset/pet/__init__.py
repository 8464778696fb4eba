"""The point-edge transformer; torch only."""
