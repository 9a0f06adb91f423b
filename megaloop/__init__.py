"""megaloop: distributed pretraining of language models whose depth changes while they train."""

__version__ = "0.1.0"
