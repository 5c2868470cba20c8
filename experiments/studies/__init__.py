"""What users ask, each a file that reads like its method section."""
