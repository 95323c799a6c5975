"""What people look at: terminal lines, pages, plots."""
