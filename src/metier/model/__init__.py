"""Bases and adapters: load, save, generate."""
