"""What does the grid's runs: which is next, its process, and what is said of it. Needs no torch."""
