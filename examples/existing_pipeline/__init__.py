"""A TorchRec training as it was, and the same with compressed tables."""
