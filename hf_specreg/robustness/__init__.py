"""How hard a classifier is to attack, in pixels: attacks, evaluation, report."""
