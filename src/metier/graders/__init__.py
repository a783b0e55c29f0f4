"""Graders: output and reference to a Score. No torch."""
