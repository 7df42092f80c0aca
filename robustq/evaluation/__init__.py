"""Evaluation: accuracies with intervals, attack suites, the worst case per image, checks for gradient masking."""
