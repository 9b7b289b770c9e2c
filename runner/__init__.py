"""runner: a declarative training-recipe runner for PyTorch."""

__version__ = "0.1.0"
