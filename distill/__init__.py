"""The objective: targets, aligners, heads, distances, mixing of views, the transfer loss."""
