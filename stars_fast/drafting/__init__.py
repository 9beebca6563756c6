"""Drafting: the language model draws the segments of a round."""
