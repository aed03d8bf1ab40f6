"""From words to a run on disk: recipes, stages, the folder, its lock, its checkpoints."""
