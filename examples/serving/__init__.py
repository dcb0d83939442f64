"""A trained model for TorchRec's inference, kept up to date by deltas."""
