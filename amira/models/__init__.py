"""Import, inspect and check model repositories."""
