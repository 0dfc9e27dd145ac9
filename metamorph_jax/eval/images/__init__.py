"""Scores of drawn images: distances between sets, agreement with captions, checks of contents."""
