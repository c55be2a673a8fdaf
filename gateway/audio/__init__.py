"""From audio of any kind to 16 kHz mono samples."""
