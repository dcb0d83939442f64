"""TorchX components: how to start the examples anywhere TorchX runs."""
