"""Measurements; results are under ``results/``."""
