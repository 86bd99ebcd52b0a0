"""How close a posterior from a small budget comes to one from all of the data, in KL."""
