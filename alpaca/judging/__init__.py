"""Whose answers are better: verdicts, votes, statistics and the report."""
