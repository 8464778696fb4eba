"""The numbers of a model card; `card.py` runs them."""
