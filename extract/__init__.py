"""The teacher: contexts, running the model, the store (write, read, verify), inspection."""
