"""The checks of `stillhouse doctor`. They import the standard library alone: a broken library cannot stop them."""
