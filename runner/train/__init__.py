"""The loop, and what it talks to."""
