"""TorchX components: how to start the examples and benchmarks anywhere TorchX runs.

Installed as ``torchrec_cafe_launch.torchx_components``, beside ``torchrec_cafe`` and not in it:
TorchX imports what is registered for every component that it runs, its own included, and this needs
no torch.
"""
