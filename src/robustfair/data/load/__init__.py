"""Sources of images as they lie on disk, and what they are decoded into."""
