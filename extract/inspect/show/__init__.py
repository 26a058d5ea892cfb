"""Facts and numbers as text, HTML and pictures. May import the rest of `inspect`."""
