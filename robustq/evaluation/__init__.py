"""Judging: accuracies with intervals, suites of attacks with the worst case per image, masking diagnosis."""
