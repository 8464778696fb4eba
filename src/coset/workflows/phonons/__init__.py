"""Phonons: from the model to bands, thermal properties and a verdict; `run` is where to begin."""
