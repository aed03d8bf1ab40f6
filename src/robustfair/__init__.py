"""robustfair: train, repair and audit image classifiers that stay robust in every class."""
