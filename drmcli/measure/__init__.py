"""Measures: intervals, protocols of preference accuracy, GenEval. No torch but in detect."""
