"""From files to sealed parts: read, clean, cluster, split, audit. No torch here."""
