"""Files of a store on a disk: names, checksums, atomic writes, locks. May import data/."""
