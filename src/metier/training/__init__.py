"""Training: batches, losses, the one loop, and the methods over it."""
