"""The commands `stillhouse corpus` and `stillhouse doctor`. They import everything of data/."""
