"""metier."""
