"""Commands of ``amira`` that need only the base package."""
