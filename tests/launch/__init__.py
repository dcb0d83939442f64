"""Jobs as TorchX starts them, and specs that it prints."""
