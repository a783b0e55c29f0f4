"""Thin shells for people: the command line."""
