"""dscl: continual learning with DeepSpeed."""

__version__ = "0.1.0"
