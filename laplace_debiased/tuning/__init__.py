"""The choice of the prior precision, from validation data or the marginal likelihood."""
