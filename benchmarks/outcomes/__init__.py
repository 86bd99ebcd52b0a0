"""What a user gets: scores of posteriors and baselines on networks that others have trained."""
