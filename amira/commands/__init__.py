"""Commands of ``amira`` that need the base package alone, and how a command ends."""
