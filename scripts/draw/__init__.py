"""What draws records: tables, figures, report, and the blocks of the pages. It imports no model, and no torch."""
