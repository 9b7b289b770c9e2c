"""Tasks that any plugin and recipe can use."""
