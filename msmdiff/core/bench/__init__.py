"""How fast training, sampling, loading and feature networks are, and what a training would cost."""
