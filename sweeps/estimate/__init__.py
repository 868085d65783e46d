"""What trials take, and how many of them run at a time."""
