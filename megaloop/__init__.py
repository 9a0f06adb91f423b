"""megaloop: distributed pretraining of language models whose depth is alive."""

__version__ = "0.1.0"
