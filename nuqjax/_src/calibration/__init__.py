"""What data tell: moments of what each parameter multiplies, and levels, scales and indices that fit them."""
