"""Posteriors that serve: threads, gradient modes, copies."""
