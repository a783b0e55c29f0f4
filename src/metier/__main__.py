"""``python -m metier``, which is also how torchrun starts it."""

from metier.app.cli import main

main()
