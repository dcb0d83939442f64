"""Capacity planning from a description of tables, without a GPU, a cluster or a model."""
