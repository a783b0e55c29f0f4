"""Find passages and examples: lexical and vector index."""
