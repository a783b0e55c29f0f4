"""Graders: output and reference to a Score. No torch.

One spec, the OpenAI grader schema with a few types of our own, serves evaluation, rewards and the
API. Each family of graders is one file; `load` chooses among them.
"""

from metier.graders.base import Grader
from metier.graders.load import load_grader
from metier.graders.summary import LabelSet, summarise

__all__ = ["Grader", "LabelSet", "load_grader", "summarise"]
