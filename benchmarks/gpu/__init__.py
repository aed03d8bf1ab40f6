"""What the suite for a GPU is made of: checks of what is computed there, speed tables, and the files it leaves."""
