"""Ctrl-C at any moment of any call, in a process of its own."""
