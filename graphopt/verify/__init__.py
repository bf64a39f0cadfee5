"""Verification: rewrites replayed on real values, whole programs against float64."""
