"""Runnable examples for torchrec_cafe."""
