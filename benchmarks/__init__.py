"""Questions about speed, one script each."""
