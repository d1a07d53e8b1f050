"""The parts of `contrastive.build`, by block of a recipe. Import from there."""
