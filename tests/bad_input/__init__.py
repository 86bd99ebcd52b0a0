"""Every bad input, what it raises, and the table of the documentation."""
