"""Models that tests and sweeps run on: shrunken Hugging Face classes, CNNs, awkward modules."""
