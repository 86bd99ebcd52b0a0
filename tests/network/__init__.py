"""Tests of the room of the same name: what a model and a loader may be, and what they stay."""
