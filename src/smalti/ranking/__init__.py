"""Orders of the patches of images: found, kept, judged, and held against orders that look at no image."""
