"""Examples from files: read, clean, split, audit. No torch."""
