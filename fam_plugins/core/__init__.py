"""From a model and a score to a map; knows neither Captum nor pytorch-grad-cam."""
