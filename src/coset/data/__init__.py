"""Training data: the packed store, its sources, splits, cached neighbor pairs and batches."""
