"""Which encoder for these images: frozen encoders, layers and image sizes first, then short adaptations of the best."""
