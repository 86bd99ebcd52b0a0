"""How much of the parameters of real networks carries a posterior, and at what cost."""
