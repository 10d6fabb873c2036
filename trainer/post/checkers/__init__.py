"""Rewards of answers: checkers, built-in ones and the user's, and the sandbox for code under test.

Imports no torch.
"""

from trainer.post.checkers.sandbox import Outcome, Program, Sandbox

__all__ = ["Outcome", "Program", "Sandbox"]
