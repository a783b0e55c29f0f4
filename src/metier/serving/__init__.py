"""Serve a specialist behind an OpenAI-compatible endpoint."""
