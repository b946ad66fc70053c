"""hvd-hetero trains PyTorch models on workers of unequal speed, on Horovod."""

__version__ = "0.1.0"
