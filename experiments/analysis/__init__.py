"""Statistics, figures and pages that all studies share."""
