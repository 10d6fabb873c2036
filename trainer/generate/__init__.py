"""Generation: continues text with a trained model."""

from trainer.generate.generate import Generation, Request, Statistics
from trainer.generate.sampling import Sampling

__all__ = ["Generation", "Request", "Sampling", "Statistics"]
