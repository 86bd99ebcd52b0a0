"""Networks of a thousand classes, and language models of fifty thousand tokens."""
