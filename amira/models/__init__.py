"""Model repositories: check, import, inspect."""
