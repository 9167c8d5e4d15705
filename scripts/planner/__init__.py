"""Plans and starts the grid's runs, and reports on them. Needs no torch."""
