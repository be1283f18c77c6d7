"""What the recipes do: train by supervision, by self-supervision or by transfer, evaluate."""
