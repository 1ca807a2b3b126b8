"""The sections of a recipe, a module for each part of the pipeline; `suasion.recipe` puts them together."""
