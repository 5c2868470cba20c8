"""The questions that users bring, each a file that reads like its method section."""
