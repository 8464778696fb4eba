"""python -m coset."""

from coset.cli import main

main()
