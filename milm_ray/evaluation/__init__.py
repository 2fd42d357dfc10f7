"""Automatic evaluation of predictions: overlap with references, intervals, Figure 3."""
