"""Passages of documents, and the indexes that find the texts nearest to a query."""
