"""Text to ids: tokenizer, template, mask. No torch."""
