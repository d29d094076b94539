"""The typed keys of every section of a recipe, without heavy imports."""
