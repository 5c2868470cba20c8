"""Web page on which people compare clips: its local server, its videos and its static files."""
