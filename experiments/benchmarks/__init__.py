"""What the README says of speed and quality, measured by one command each."""
