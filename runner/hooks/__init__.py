"""The built-in hooks, one file each."""
