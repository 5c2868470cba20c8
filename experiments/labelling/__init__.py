"""The page on which people compare clips: a server on this machine, and the page it serves."""
