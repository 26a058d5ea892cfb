"""Studies: arms x seeds of one recipe, run and compared. Imports data and the folders of train below this one."""
