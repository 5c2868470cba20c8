"""Learning from comparisons, end to end: settings, the loop, the run directory, its report."""
