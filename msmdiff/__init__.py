"""msmdiff: train diffusion transformers cheaply by masking."""

__version__ = "0.1.0"
