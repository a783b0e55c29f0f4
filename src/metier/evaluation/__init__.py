"""Arms, statistics, forgetting, verdict and report."""
