"""Scores of edited videos."""
