"""Training of the bundled model: data, training, export, and the word error rates of its card."""
