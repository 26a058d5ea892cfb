"""What works on this machine, and what to install: `stillhouse doctor`. Imports nothing but the standard library."""
