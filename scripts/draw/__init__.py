"""Draws records as tables, figures, report, and blocks of the pages. It imports no model and no torch."""
