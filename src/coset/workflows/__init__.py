"""What users run: generate structures, evaluate them in one batch, fit."""
