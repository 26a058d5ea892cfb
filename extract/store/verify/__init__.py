"""Find what is damaged or stale. May import everything else in store/."""
