"""What our transports share; for them alone, and no part of the API."""
