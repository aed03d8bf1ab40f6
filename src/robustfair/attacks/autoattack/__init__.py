"""The AutoAttack family: its searches, and the engine that runs them side by side."""
